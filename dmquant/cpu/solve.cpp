// The parts of solving a rounding that are no matrix products: values of a grid chosen column by column, and the search
// of scales under weights of the columns. Rows are independent, and go side by side in the lanes of vectors.
//
// Every operation on floats is the IEEE operation of the eager code (compile with -ffp-contract=off).

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

constexpr int LANES = 16, TILE = 2;  // TILE vectors of rows: what a block of columns needs of them fits a core's cache
typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));

constexpr int32_t EXPONENT_FIELD = 0x7F800000;
constexpr int FRACTION_BITS = 23, BIAS = 127;
constexpr float SMALLEST = 0x1p-126f;  // as dmquant/stores.py
constexpr float TO_INTEGER = 12582912.0f;  // 1.5 * 2^23: added and taken away, it rounds to integers

struct Format {
    int32_t floating, mantissa, min_exponent, max_exponent;
    float min, max;
};

static inline Floats all(float value) { return Floats{} + value; }
static inline Floats held(Floats x, float low, float high) {
    x = x < low ? all(low) : x;  // NaN stays
    return x > high ? all(high) : x;
}
static inline float two_to(int exponent) {
    int32_t bits = (exponent + BIAS) << FRACTION_BITS;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

// As FloatFormat.round of dmquant.formats.floating.
struct FloatRounding {
    float lowest, highest, largest, factor;
    int32_t first, parity;

    explicit FloatRounding(const Format& format)
        : lowest(two_to(format.min_exponent)), highest(two_to(format.max_exponent)), largest(format.max),
          factor(1.5f * two_to(FRACTION_BITS - format.mantissa)), first(format.min_exponent + BIAS),
          parity(format.mantissa ? 0 : 1) {}

    Floats operator()(Floats x) const {
        Floats binade = held((Floats)((Ints)x & EXPONENT_FIELD), lowest, highest);
        Ints odd = (((Ints)binade >> FRACTION_BITS) - first) & parity;
        Floats anchor = (Floats)((Ints)(binade * factor) + odd);
        return held((x + anchor) - anchor, -largest, largest);
    }
};

struct IntRounding {
    float low, high;

    explicit IntRounding(const Format& format) : low(format.min), high(format.max) {}

    Floats operator()(Floats x) const { return (held(x, low, high) + TO_INTEGER) - TO_INTEGER; }
};

static inline Floats loaded(const float* from, int64_t count) {  // the first `count` lanes; the others repeat the first
    Floats x = all(from[0]);
    if (count >= LANES) std::memcpy(&x, from, sizeof x);
    else std::memcpy(&x, from, 4 * count);
    return x;
}
static inline Floats loaded(const float* from) { return loaded(from, LANES); }
static inline Floats loaded(const uint16_t* from) {  // bfloat16
    Ints x;
    for (int lane = 0; lane < LANES; lane++) x[lane] = int32_t(uint32_t(from[lane]) << 16);
    return (Floats)x;
}
static inline void store(float* to, const Floats& x, int64_t count) {
    if (count >= LANES) std::memcpy(to, &x, sizeof x);
    else std::memcpy(to, &x, 4 * count);
}

// Matrices are (columns, rows); `coupling` is (columns, columns).
template <class Rounding>
static void in_turn(
    const Rounding& round, int threads, int64_t columns, int64_t rows, const float* scales, const float* coupling,
    const float* before, float* wanted, float* values
) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < rows; row += LANES * TILE) {
        std::vector<Floats> moved(columns * TILE);
        for (int tile = 0; tile < TILE; tile++) {
            const int64_t at = std::min(row + tile * LANES, rows - 1);
            for (int64_t i = 0; i < columns; i++)
                moved[i * TILE + tile] = loaded(wanted + i * rows + at, rows - at);
        }
        for (int64_t i = 0; i < columns; i++) {
            Floats error[TILE];
            for (int tile = 0; tile < TILE; tile++) {
                const int64_t at = std::min(row + tile * LANES, rows - 1), count = rows - at;
                const Floats scale = loaded(scales + i * rows + at, count);
                const Floats value = round(moved[i * TILE + tile] / scale) * scale;
                error[tile] = loaded(before + i * rows + at, count) - value;
                store(wanted + i * rows + at, moved[i * TILE + tile], count);
                store(values + i * rows + at, value, count);
            }
            const float* to = coupling + i * columns;
            for (int64_t j = i + 1; j < columns; j++)
                for (int tile = 0; tile < TILE; tile++) moved[j * TILE + tile] += error[tile] * to[j];
        }
    }
}

// `groups` (rows, groups, size); `scales` (tried, rows, groups); `weights` (powers, groups, size); `chosen` (powers,
// rows, groups): which of those tried has the least weighted squared error, the first where several have.
template <class Rounding>
static void search(
    const Rounding& round, int threads, int64_t rows, int64_t groups, int64_t size, int64_t tried, int64_t powers,
    const float* matrix, const float* scales, const float* weights, uint8_t* chosen
) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < rows; row += LANES) {
        std::vector<Floats> x(size), errors(powers), least(powers);
        std::vector<Ints> best(powers);
        const int64_t count = std::min<int64_t>(LANES, rows - row);
        for (int64_t group = 0; group < groups; group++) {
            int64_t place[LANES];
            for (int lane = 0; lane < LANES; lane++) {
                place[lane] = (row + std::min<int64_t>(lane, count - 1)) * groups + group;
                for (int64_t i = 0; i < size; i++) x[i][lane] = matrix[place[lane] * size + i];
            }
            std::fill(least.begin(), least.end(), all(INFINITY));
            std::fill(best.begin(), best.end(), Ints{});
            for (int64_t k = 0; k < tried; k++) {
                Floats scale;
                for (int lane = 0; lane < LANES; lane++) scale[lane] = scales[k * rows * groups + place[lane]];
                std::fill(errors.begin(), errors.end(), Floats{});
                const float* weight = weights + group * size;
                for (int64_t i = 0; i < size; i++) {
                    const Floats error = round(x[i] / scale) * scale - x[i], squared = error * error;
                    for (int64_t p = 0; p < powers; p++) errors[p] += squared * weight[p * groups * size + i];
                }
                for (int64_t p = 0; p < powers; p++) {
                    const Ints better = errors[p] < least[p];
                    least[p] = better ? errors[p] : least[p];
                    best[p] = better ? Ints{} + int32_t(k) : best[p];
                }
            }
            for (int64_t p = 0; p < powers; p++)
                for (int lane = 0; lane < count; lane++)
                    chosen[p * rows * groups + place[lane]] = uint8_t(best[p][lane]);
        }
    }
}

static inline void store(uint16_t* to, const Floats& x, int64_t) {  // to bfloat16, ties to even; NaN stays NaN
    const Ints bits = (Ints)x, rounded = bits + 0x7FFF + ((bits >> 16) & 1), chosen = x == x ? rounded : bits | 0x400000;
    for (int lane = 0; lane < LANES; lane++) to[lane] = uint16_t(uint32_t(chosen[lane]) >> 16);
}

// Bits are ordered as magnitudes are, NaN above all.
template <class T>
static float largest_magnitude(const T* x, int64_t size) {
    Ints most{};
    for (int64_t i = 0; i < size; i += LANES) {
        const Ints bits = (Ints)loaded(x + i) & INT32_MAX;
        most = bits > most ? bits : most;
    }
    int32_t largest = 0;
    for (int lane = 0; lane < LANES; lane++) largest = std::max(largest, most[lane]);
    float magnitude;
    std::memcpy(&magnitude, &largest, 4);
    return magnitude;
}

template <class Rounding, class T>
static void online(
    const Rounding& round, int threads, const T* x, int64_t count, int64_t size, float most, float largest, T* to
) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t run = 0; run < count; run++) {
        const float magnitude = largest_magnitude(x + run * size, size);
        float scale = (magnitude < SMALLEST ? SMALLEST : magnitude) / most;
        scale = scale < SMALLEST ? SMALLEST : scale > largest ? largest : scale;
        for (int64_t i = run * size; i < (run + 1) * size; i += LANES)
            store(to + i, round(loaded(x + i) / scale) * scale, LANES);
    }
}

template <class Rounding>
static void runs(
    const Rounding& round, int threads, const float* x, int64_t count, int64_t size, const float* scales, float* to
) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t run = 0; run < count; run++)
        for (int64_t i = run * size; i < (run + 1) * size; i += LANES)
            store(to + i, round(loaded(x + i) / scales[run]) * scales[run], LANES);
}

extern "C" {

// Values of a grid for some columns of some rows, one column after another; each error moves what the columns after it
// want. `wanted` ends as what each column wanted in its turn.
void round_in_turn(
    const Format* format, int threads, int64_t columns, int64_t rows, const float* scales, const float* coupling,
    const float* before, float* wanted, float* values
) {
    if (format->floating)
        in_turn(FloatRounding(*format), threads, columns, rows, scales, coupling, before, wanted, values);
    else in_turn(IntRounding(*format), threads, columns, rows, scales, coupling, before, wanted, values);
}

void search_weighted(
    const Format* format, int threads, int64_t rows, int64_t groups, int64_t size, int64_t tried, int64_t powers,
    const float* matrix, const float* scales, const float* weights, uint8_t* chosen
) {
    if (format->floating)
        search(FloatRounding(*format), threads, rows, groups, size, tried, powers, matrix, scales, weights, chosen);
    else search(IntRounding(*format), threads, rows, groups, size, tried, powers, matrix, scales, weights, chosen);
}

// The largest magnitude of every run of `size` of `count` * `size` floats; NaN where one is. Here and below `size` is a
// multiple of LANES.
void magnitudes(int threads, const float* x, int64_t count, int64_t size, float* to) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t run = 0; run < count; run++) to[run] = largest_magnitude(x + run * size, size);
}

// Every run rounded to a format times the scale that makes its largest magnitude the format's, at most `largest`.
void round_online(
    const Format* format, int threads, const float* x, int64_t count, int64_t size, float largest, float* to
) {
    if (format->floating) online(FloatRounding(*format), threads, x, count, size, format->max, largest, to);
    else online(IntRounding(*format), threads, x, count, size, format->max, largest, to);
}

void round_online_bf16(
    const Format* format, int threads, const uint16_t* x, int64_t count, int64_t size, float largest, uint16_t* to
) {
    if (format->floating) online(FloatRounding(*format), threads, x, count, size, format->max, largest, to);
    else online(IntRounding(*format), threads, x, count, size, format->max, largest, to);
}

// Every run rounded to a format times its own scale.
void round_runs(
    const Format* format, int threads, const float* x, int64_t count, int64_t size, const float* scales, float* to
) {
    if (format->floating) runs(FloatRounding(*format), threads, x, count, size, scales, to);
    else runs(IntRounding(*format), threads, x, count, size, scales, to);
}

// The gradient straight through `round_runs`: by x, that by the values where x is within the ends of the format, and by
// the logarithm of each scale.
void straight_gradient(
    const Format* format, int threads, const float* x, const float* values, const float* gradient, int64_t count,
    int64_t size, const float* scales, float* by_x, float* by_scale
) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t run = 0; run < count; run++) {
        const float one = scales[run] * format->min, other = scales[run] * format->max;
        const float low = std::min(one, other), high = std::max(one, other);  // a negative scale turns them around
        Floats sum{};
        for (int64_t i = run * size; i < (run + 1) * size; i += LANES) {
            const Floats from = loaded(x + i), by_value = loaded(gradient + i);
            const Floats passed = (from < low) | (from > high) ? all(0.0f) : by_value;
            store(by_x + i, passed, LANES);
            sum += by_value * loaded(values + i) - passed * from;
        }
        float total = 0;
        for (int lane = 0; lane < LANES; lane++) total += sum[lane];
        by_scale[run] = total;
    }
}
}
