// Data-free quantization of a weight: amplitudes of groups, the search of their scales, codes, packing.
//
// Bit for bit what dmquant.qtensor does eagerly: every operation on floats is the same IEEE operation (compile with
// -ffp-contract=off), squared errors are summed in the order of torch.sum, whose vector width is a parameter.
// As many groups as a vector has lanes go side by side, one in each, so that no sum runs across a vector.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__AVX512F__) || defined(__FMA__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif
typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));

constexpr int32_t EXPONENT_FIELD = 0x7F800000, MAGNITUDE = INT32_MAX;
constexpr int FRACTION_BITS = 23, BIAS = 127, BLOCK_ROWS = 16, MOST_MULTIPLES = 32;
constexpr float TO_INTEGER = 12582912.0f;  // 1.5 * 2^23: added and taken away, it rounds to integers
constexpr float SMALLEST = 0x1p-126f, SAFE_LOW = 0x1p-60f, SAFE_HIGH = 0x1p60f;

enum Dtype { FLOAT32, BFLOAT16, FLOAT16 };
enum Store { FP32, BF16, E8M0, POW2, E4M3, E3M4 };
enum Kind { INTEGER, FLOATING, TABLE };

struct Format {
    int32_t kind, bits, mantissa, min_exponent;
    float min, max;
    const float* values;  // of a table: 16, ascending
    const float* ends;    // the last float that rounds to each but the highest, and infinity
};

struct Job {
    const void* matrix;        // (rows, columns), contiguous
    const int64_t* starts;     // first column of each group of a row
    const int64_t* lengths;    // its columns; up to `size` it is padded with zeros
    const float* amplitudes;   // (rows, groups)
    const float* base;         // one, or one a row, or null
    const float* scales;       // decoded: (rows, groups), or one row for all
    const float* multiples;    // of the amplitude; the first is the one to beat
    void* stored;              // (rows, groups), as the store keeps scales
    uint8_t* codes;            // (rows, bytes)
    int64_t columns, groups, size, bytes, base_stride, scale_stride, multiple_count, sum_width;
    int32_t dtype, store, octaves_below, largest_exponent;
    float largest_scale;
    Format format, of_scales;
};

static inline Floats all(float value) { return Floats{} + value; }
static inline Ints all(int32_t value) { return Ints{} + value; }
static inline Ints least(Ints a, Ints b) { return a < b ? a : b; }
static inline Ints most(Ints a, Ints b) { return a > b ? a : b; }
static inline Floats abs_of(Floats x) { return (Floats)((Ints)x & MAGNITUDE); }
static inline int32_t bits_of(float x) { int32_t bits; std::memcpy(&bits, &x, 4); return bits; }
static inline float of_bits(int32_t bits) { float x; std::memcpy(&x, &bits, 4); return x; }
static inline float two_to(int exponent) { return of_bits((exponent + BIAS) << FRACTION_BITS); }

struct Brain { uint16_t bits; };  // bfloat16
struct Half { uint16_t bits; };   // float16
static inline float load(const float* from) { return *from; }
static inline float load(const Brain* from) { return of_bits(int32_t(from->bits) << 16); }
static inline float load(const Half* from) {
    const int32_t magnitude = from->bits & 0x7FFF, sign = int32_t(from->bits >> 15) << 31;
    const float finite = of_bits(magnitude << 13) * 0x1p112f;  // subnormals, too
    return of_bits(sign | (magnitude < 0x7C00 ? bits_of(finite) : EXPONENT_FIELD | (magnitude << 13)));
}

#if defined(__AVX512F__)
#define FUSED 1
static inline Floats least(Floats a, Floats b) { return (Floats)_mm512_min_ps((__m512)a, (__m512)b); }
static inline Floats most(Floats a, Floats b) { return (Floats)_mm512_max_ps((__m512)a, (__m512)b); }
static inline Floats fused(Floats a, Floats b, Floats c) {
    return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
#elif defined(__FMA__)
#define FUSED 1
static inline Floats least(Floats a, Floats b) { return (Floats)_mm256_min_ps((__m256)a, (__m256)b); }
static inline Floats most(Floats a, Floats b) { return (Floats)_mm256_max_ps((__m256)a, (__m256)b); }
static inline Floats fused(Floats a, Floats b, Floats c) {
    return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}
#else
#define FUSED 0
static inline Floats least(Floats a, Floats b) { return a < b ? a : b; }
static inline Floats most(Floats a, Floats b) { return a > b ? a : b; }
static inline Floats fused(Floats, Floats, Floats c) { return c; }
#endif

// x / scale, in a third of a division's time and without the sign of a zero: x * (1 / scale), corrected by the exact
// remainder (Markstein 1990). Far from overflow and underflow it is off by less than 2^-47 before it is rounded, so that
// it rounds to another value of a format than x / scale could only where x / scale is that close to half a unit in the
// last place beside a midpoint of at most 10 bits. Only scales within 16 of a multiple of 2^16, as integers of 24 bits,
// come so close; all of them were tried at all midpoints, and give the quotient.
template <bool DIVIDE>
static inline Floats quotient(Floats x, Floats scale, Floats inverse) {
    if (DIVIDE) return x / scale;
    const Floats guess = x * inverse;
    return fused(fused(-guess, scale, x), inverse, guess);
}

// The format's values are symmetric: magnitudes alone are rounded. As FloatFormat of dmquant.formats.floating.
template <bool PARITY>
struct FloatRounding {
    int32_t lowest, largest, shift;
    float factor;
    int sign_shift;

    explicit FloatRounding(const Format& format)
        : lowest((format.min_exponent + BIAS) << FRACTION_BITS), largest(bits_of(format.max)),
          shift(FRACTION_BITS - format.mantissa), factor(1.5f * two_to(FRACTION_BITS - format.mantissa)),
          sign_shift(format.bits - 1) {}

    static Floats prepared(Floats x) { return abs_of(x); }
    Ints binade(Ints magnitude) const { return most(magnitude & EXPONENT_FIELD, all(lowest)); }
    Floats anchor(Ints binade) const {
        Floats plain = (Floats)binade * factor;
        if (!PARITY) return plain;
        return (Floats)((Ints)plain + (((binade - lowest) >> FRACTION_BITS) & 1));
    }
    Floats round(Floats magnitude) const {
        Ints inside = least((Ints)magnitude, all(largest));
        Floats far = anchor(binade(inside));
        return ((Floats)inside + far) - far;
    }
    Ints encode(Floats x) const {
        Ints inside = least((Ints)abs_of(x), all(largest)), power = binade(inside);
        Floats far = anchor(power);
        Ints steps = (Ints)((Floats)inside + far) - (Ints)far;
        return (((power - lowest) >> shift) + steps) | ((((Ints)x >> 31) & 1) << sign_shift);
    }
    Floats decode(Ints codes) const {  // positive codes of a format with a mantissa
        Floats normal = (Floats)((codes << shift) + (lowest - (1 << FRACTION_BITS)));
        return least(normal, 2.0f * normal - of_bits(lowest));
    }
};

struct IntRounding {
    float low, high;
    int32_t mask;

    explicit IntRounding(const Format& format) : low(format.min), high(format.max), mask((1 << format.bits) - 1) {}

    static Floats prepared(Floats x) { return x; }
    Floats far(Floats x) const { return most(least(x, all(high)), all(low)) + TO_INTEGER; }
    Floats round(Floats x) const { return far(x) - TO_INTEGER; }
    Ints encode(Floats x) const { return (Ints)far(x) & mask; }
};

// As LookupFormat of dmquant.formats.lookup.
struct TableRounding {
    const float *values, *ends;

    explicit TableRounding(const Format& format) : values(format.values), ends(format.ends) {}

    static Floats prepared(Floats x) { return x; }
#if defined(__AVX512F__)
    static Floats pick(const float* table, Ints at) {
        return (Floats)_mm512_permutexvar_ps((__m512i)at, _mm512_loadu_ps(table));
    }
    Ints encode(Floats x) const {
        Ints at = {};
        for (int step = 8; step; step /= 2) at += (x > pick(ends, at + (step - 1))) & step;
        return at;
    }
    Floats round(Floats x) const { return pick(values, encode(x)); }
#else
    Ints encode(Floats x) const {
        Ints at = {};
        for (int i = 0; i < 15; i++) at -= x > ends[i];
        return at;
    }
    Floats round(Floats x) const {
        Floats value = all(values[0]);
        for (int i = 0; i < 15; i++) value = x > ends[i] ? all(values[i + 1]) : value;
        return value;
    }
#endif
};

template <class Rounding, bool DIVIDE>
struct SquaredError {
    const Rounding& rounding;
    const Floats* x;
    Floats scale, inverse;

    Floats operator()(int64_t i) const {
        Floats error = rounding.round(quotient<DIVIDE>(x[i], scale, inverse)) * scale - x[i];
        return error * error;
    }
};

// Sums as torch orders them (aten/src/ATen/native/cpu/SumKernel.cpp): of every width-th term, in four interleaved sums,
// each over levels once it is long.
template <class Terms>
static inline Floats row_sum(const Terms& terms, int64_t start, int64_t stride, int64_t count) {
    constexpr int LEVELS = 4;
    const int64_t quads = count / 4;
    Floats sums[4] = {};
    if (quads < 16) {
        for (int64_t i = 0; i < quads; i++)
            for (int k = 0; k < 4; k++) sums[k] += terms(start + stride * (4 * i + k));
    } else {
        int64_t ceil_log2 = 64 - __builtin_clzll(uint64_t(quads - 1));
        const int64_t power = std::max<int64_t>(4, ceil_log2 / LEVELS), step = int64_t(1) << power;
        Floats levels[LEVELS][4] = {};
        int64_t i = 0;
        while (i + step <= quads) {
            for (int64_t j = 0; j < step; j++, i++)
                for (int k = 0; k < 4; k++) levels[0][k] += terms(start + stride * (4 * i + k));
            for (int level = 1; level < LEVELS; level++) {
                for (int k = 0; k < 4; k++) {
                    levels[level][k] += levels[level - 1][k];
                    levels[level - 1][k] = Floats{};
                }
                if (i & ((step - 1) << (level * power))) break;
            }
        }
        for (; i < quads; i++)
            for (int k = 0; k < 4; k++) levels[0][k] += terms(start + stride * (4 * i + k));
        for (int k = 0; k < 4; k++) {
            for (int level = 1; level < LEVELS; level++) levels[0][k] += levels[level][k];
            sums[k] = levels[0][k];
        }
    }
    for (int64_t i = 4 * quads; i < count; i++) sums[0] += terms(start + stride * i);
    return ((sums[0] + sums[1]) + sums[2]) + sums[3];
}

template <class Terms>
static Floats sum(const Terms& terms, int64_t size, int64_t width) {
    if (size < width) return row_sum(terms, 0, 1, size);
    const int64_t vectors = size / width;
    Floats total = {};
    for (int64_t i = vectors * width; i < size; i++) total += terms(i);
    for (int64_t k = 0; k < width; k++) total += row_sum(terms, k, width, vectors);
    return total;
}

// Stored scales of amplitudes, as integers or the bits of floats: the `encode` of dmquant.stores.
static inline Ints encode_scale(const Job& job, Floats amplitude, Floats base) {
    const Floats wanted = amplitude / job.format.max;
    if (job.store == E8M0) {
        Ints exponent = ((Ints)amplitude >> FRACTION_BITS) - job.largest_exponent;
        return least(most(exponent, all(1)), all(254));
    }
    if (job.store == POW2) {
        Floats ratio = most(wanted / base, all(two_to(-job.octaves_below)));
        Ints exponent = ((Ints)ratio >> FRACTION_BITS) - BIAS;
        exponent -= ratio > (Floats)((exponent + BIAS) << FRACTION_BITS);  // a true comparison is -1
        return least(most(exponent, all(-job.octaves_below)), all(127)) + BIAS;
    }
    if (job.store >= E4M3) {
        const Floats ratio = wanted / base, lowest = all(two_to(job.of_scales.min_exponent - job.of_scales.mantissa));
        const Ints signs = (Ints)ratio & ~MAGNITUDE;
        return FloatRounding<false>(job.of_scales).encode((Floats)((Ints)most(abs_of(ratio), lowest) | signs));
    }
    Ints bits = (Ints)least(most(wanted, all(SMALLEST)), all(job.largest_scale));
    if (job.store == FP32) return bits;
    return (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
}

static inline Floats decode_scale(const Job& job, Ints stored, Floats base) {
    switch (job.store) {
        case E8M0: return (Floats)(stored << FRACTION_BITS);
        case POW2: return base * (Floats)(stored << FRACTION_BITS);
        case E4M3:
        case E3M4: {
            const Ints magnitude = (Ints)FloatRounding<false>(job.of_scales).decode(stored & 0x7F);
            return base * (Floats)(magnitude | ((stored >> 7) << 31));
        }
        case FP32: return (Floats)stored;
        default: return (Floats)(stored << 16);
    }
}

template <bool DIVIDE, class Rounding>
static inline Floats error_of(const Job& job, const Rounding& rounding, const Floats* x, Floats scale) {
    return sum(SquaredError<Rounding, DIVIDE>{rounding, x, scale, 1.0f / scale}, job.size, job.sum_width);
}

// Of the first and the following multiples of the amplitude, that of least error, as stored.
template <bool DIVIDE, class Rounding>
static Ints least_of(const Job& job, const Rounding& rounding, const Floats* x, const Ints* tried, Floats base) {
    Ints chosen = tried[0];
    Floats least_error = error_of<DIVIDE>(job, rounding, x, decode_scale(job, chosen, base));
    for (int64_t m = 1; m < job.multiple_count; m++) {
        Floats error = error_of<DIVIDE>(job, rounding, x, decode_scale(job, tried[m], base));
        Ints better = error < least_error;
        chosen = better ? tried[m] : chosen;
        least_error = better ? error : least_error;
    }
    return chosen;
}

template <class Rounding>
static Ints search(const Job& job, const Rounding& rounding, const Floats* x, Floats amplitude, Floats base) {
    Ints tried[MOST_MULTIPLES];
    Ints unsafe = amplitude > SAFE_HIGH;
    for (int64_t m = 0; m < job.multiple_count; m++) {
        tried[m] = encode_scale(job, amplitude * job.multiples[m], base);
        Floats scale = decode_scale(job, tried[m], base);
        unsafe |= (abs_of(scale) < SAFE_LOW) | (abs_of(scale) > SAFE_HIGH);
    }
    if (job.multiple_count == 1) return tried[0];
    int32_t any = !FUSED;
    for (int lane = 0; lane < LANES; lane++) any |= unsafe[lane];
    return any ? least_of<true>(job, rounding, x, tried, base) : least_of<false>(job, rounding, x, tried, base);
}

static void pack(const uint8_t* codes, int64_t count, int bits, uint8_t* to) {
    if (bits == 8) {
        std::memcpy(to, codes, count);
        return;
    }
    int64_t i = 0;
    if (bits == 4)
        for (; i + 1 < count; i += 2) *to++ = uint8_t(codes[i] | (codes[i + 1] << 4));
    uint32_t held = 0;
    int filled = 0;
    for (; i < count; i++) {
        held |= uint32_t(codes[i]) << filled;
        for (filled += bits; filled >= 8; filled -= 8, held >>= 8) *to++ = uint8_t(held);
    }
    if (filled) *to = uint8_t(held);
}

static void store(const Job& job, int64_t group, int32_t stored) {
    if (job.store == FP32) static_cast<int32_t*>(job.stored)[group] = stored;
    else if (job.store == BF16) static_cast<uint16_t*>(job.stored)[group] = uint16_t(stored);
    else static_cast<uint8_t*>(job.stored)[group] = uint8_t(stored);
}

template <class Rounding, class Element>
static void quantize_rows(const Job& job, const Element* matrix, int64_t first, int64_t end) {
    const Rounding rounding(job.format);
    const int64_t size = job.size;
    std::vector<Floats> space(2 * size);
    Floats* signed_x = space.data();
    Floats* x = signed_x + size;
    std::vector<uint8_t> codes(BLOCK_ROWS * job.columns), lane_codes(LANES * size);
    for (int64_t row = first; row < end; row += BLOCK_ROWS) {
        const int64_t rows = std::min<int64_t>(BLOCK_ROWS, end - row), count = rows * job.groups;
        for (int64_t group = 0; group < count; group += LANES) {
            const int lanes = int(std::min<int64_t>(LANES, count - group));
            Floats amplitude = all(1.0f), base = all(1.0f);
            int64_t lane_rows[LANES], lane_groups[LANES];
            for (int lane = 0; lane < LANES; lane++) {
                int64_t index = group + std::min(lane, lanes - 1);
                int64_t at = lane_rows[lane] = index / job.groups, which = lane_groups[lane] = index % job.groups;
                amplitude[lane] = job.amplitudes[row * job.groups + index];
                if (job.base) base[lane] = job.base[(row + at) * job.base_stride];
                const Element* from = matrix + (row + at) * job.columns + job.starts[which];
                float* to = reinterpret_cast<float*>(signed_x) + lane;
                const int64_t length = job.lengths[which];
                for (int64_t i = 0; i < length; i++) to[i * LANES] = load(from + i);
                for (int64_t i = length; i < size; i++) to[i * LANES] = 0;
            }
            if (job.multiple_count > 1)
                for (int64_t i = 0; i < size; i++) x[i] = Rounding::prepared(signed_x[i]);
            const Ints stored = search(job, rounding, x, amplitude, base);
            const Floats scale = decode_scale(job, stored, base);
            for (int64_t i = 0; i < size; i++) {
                Ints code = rounding.encode(signed_x[i] / scale);
                for (int lane = 0; lane < LANES; lane++) lane_codes[i * LANES + lane] = uint8_t(code[lane]);
            }
            for (int lane = 0; lane < lanes; lane++) {
                store(job, row * job.groups + group + lane, stored[lane]);
                uint8_t* to = codes.data() + lane_rows[lane] * job.columns + job.starts[lane_groups[lane]];
                const int64_t length = job.lengths[lane_groups[lane]];
                for (int64_t i = 0; i < length; i++) to[i] = lane_codes[i * LANES + lane];
            }
        }
        for (int64_t i = 0; i < rows; i++)
            pack(codes.data() + i * job.columns, job.columns, job.format.bits, job.codes + (row + i) * job.bytes);
    }
}

template <class Element>
static void quantize_any(const Job& job, const Element* matrix, int64_t first, int64_t end) {
    if (job.format.kind == INTEGER) quantize_rows<IntRounding>(job, matrix, first, end);
    else if (job.format.kind == TABLE) quantize_rows<TableRounding>(job, matrix, first, end);
    else if (job.format.mantissa) quantize_rows<FloatRounding<false>>(job, matrix, first, end);
    else quantize_rows<FloatRounding<true>>(job, matrix, first, end);
}

template <class Element>
static void largest_magnitudes(const Job& job, const Element* matrix, int64_t first, int64_t end, float* to) {
    for (int64_t row = first; row < end; row++) {
        for (int64_t group = 0; group < job.groups; group++) {
            const Element* from = matrix + row * job.columns + job.starts[group];
            int32_t largest = bits_of(SMALLEST);
            for (int64_t i = 0; i < job.lengths[group]; i++)  // bits are ordered as magnitudes are, NaN above all
                largest = std::max(largest, bits_of(load(from + i)) & MAGNITUDE);
            to[row * job.groups + group] = of_bits(largest);
        }
    }
}

// Squared error of the codes, and squared weights, summed over some rows.
template <class Element>
static void squares_of(const Job& job, const Element* matrix, const float* values, int64_t first, int64_t end, double* to) {
    const int bits = job.format.bits, mask = (1 << bits) - 1;
    std::vector<uint8_t> bytes(job.bytes + 1);  // two bytes can be read at the end of a row, too
    double lost = 0, total = 0;
    for (int64_t row = first; row < end; row++) {
        const Element* x = matrix + row * job.columns;
        std::memcpy(bytes.data(), job.codes + row * job.bytes, job.bytes);
        for (int64_t group = 0; group < job.groups; group++) {
            const float scale = job.scales[row * job.scale_stride + group];
            float lost_here = 0, total_here = 0;
            for (int64_t i = job.starts[group]; i < job.starts[group] + job.lengths[group]; i++) {
                const int64_t bit = i * bits;
                const int code = ((bytes[bit >> 3] | bytes[(bit >> 3) + 1] << 8) >> (bit & 7)) & mask;
                const float exact = load(x + i), error = values[code] * scale - exact;
                lost_here += error * error;
                total_here += exact * exact;
            }
            lost += lost_here;
            total += total_here;
        }
    }
    to[0] = lost;
    to[1] = total;
}

struct Plain {
    const Floats* x;
    Floats operator()(int64_t i) const { return x[i]; }
};

// Call the work with the matrix as what it holds.
template <class Work>
static void with_matrix(const Job& job, Work work) {
    if (job.dtype == BFLOAT16) work(static_cast<const Brain*>(job.matrix));
    else if (job.dtype == FLOAT16) work(static_cast<const Half*>(job.matrix));
    else work(static_cast<const float*>(job.matrix));
}

extern "C" {

// The largest magnitude of every group of rows `first` to `end`, at least the smallest normal float32; NaN where one is.
void amplitudes(const Job* job, int64_t first, int64_t end, float* to) {
    with_matrix(*job, [&](auto matrix) { largest_magnitudes(*job, matrix, first, end, to); });
}

// Scales and codes of rows `first` to `end`.
void quantize(const Job* job, int64_t first, int64_t end) {
    with_matrix(*job, [&](auto matrix) { quantize_any(*job, matrix, first, end); });
}

// To `to` and the place after it: the squared errors of codes that mean `values`, and the squared weights.
void squares(const Job* job, const float* values, int64_t first, int64_t end, double* to) {
    with_matrix(*job, [&](auto matrix) { squares_of(*job, matrix, values, first, end, to); });
}

// The sum of each of `count` rows of `size` floats, ordered as torch.sum with vectors of `width` floats.
void sums(const float* rows, int64_t count, int64_t size, int64_t width, float* to) {
    std::vector<Floats> x(size);
    for (int64_t row = 0; row < count; row++) {
        for (int64_t i = 0; i < size; i++) x[i] = all(rows[row * size + i]);
        to[row] = sum(Plain{x.data()}, size, width)[0];
    }
}

}
