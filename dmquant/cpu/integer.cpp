// Products of small integers with exact sums, in the instructions of this machine: dmquant/cpu/integer.py.
//
// Inputs are rounded to unsigned bytes, code + zero. Weights are bytes too, code times the factor of its group; a panel
// of them lies as [columns / 4][WIDE outputs][4], the four bytes that one instruction multiplies by four of an
// input. Sums are int32; zero times the sum of an output's weights is taken off afterwards.
#if defined(__AVX512F__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("prefer-vector-width=512")  // rounding takes half the time
#endif
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

enum Level { PORTABLE, AVX2, AVX_VNNI, AVX512_VNNI };

constexpr int64_t LINE = 64;

int64_t wide_of(int level) { return level == AVX512_VNNI ? 64 : 16; }

template <class T> struct Freed { void operator()(T* memory) const { std::free(memory); } };
template <class T> using Buffer = std::unique_ptr<T[], Freed<T>>;
template <class T> Buffer<T> buffer(int64_t count) {
    const size_t bytes = (count * sizeof(T) + LINE - 1) / LINE * LINE;
    return Buffer<T>(static_cast<T*>(std::aligned_alloc(LINE, std::max<size_t>(bytes, LINE))));
}

inline float as_float(uint32_t bits) { float x; std::memcpy(&x, &bits, 4); return x; }
inline uint32_t as_bits(float x) { uint32_t bits; std::memcpy(&bits, &x, 4); return bits; }
inline float load(float x) { return x; }
inline float load(uint16_t bfloat16) { return as_float(uint32_t(bfloat16) << 16); }
inline void store(float x, float& to) { to = x; }
inline void store(float x, uint16_t& to) {  // to bfloat16, ties to even; NaN stays NaN
    const uint32_t bits = as_bits(x);
    to = uint16_t((x != x ? bits | 0x400000u : bits + 0x7FFFu + ((bits >> 16) & 1)) >> 16);
}

// What rounding needs of a format: of an integer one, or of a float one with its exponents (see formats/floating.py).
struct Format {
    int32_t is_float, mantissa;
    float lowest, highest;  // integers: the ends of the range; floats: the first and the last binade
    float largest, most, unit;  // the largest value; the largest scale; what makes values integers
    int32_t zero;
};

constexpr float SMALLEST = 0x1p-126f;  // as stores.py

inline float scale_of(float largest_magnitude, const Format& format) {
    const float magnitude = largest_magnitude < SMALLEST ? SMALLEST : largest_magnitude;
    const float scale = magnitude / format.largest;
    return scale < SMALLEST ? SMALLEST : scale > format.most ? format.most : scale;
}

// The correctly rounded x / scale by the reciprocal of the scale (Markstein 1990): two corrections by exact remainders.
inline float quotient(float x, float scale, float reciprocal) {
    float q = x * reciprocal;
    q = std::fma(std::fma(-q, scale, x), reciprocal, q);
    return std::fma(std::fma(-q, scale, x), reciprocal, q);
}

template <bool FLOAT, bool DIVIDE, class T>
void round_run(const T* x, int64_t count, float scale, const Format& f, uint8_t* codes) {
    const float reciprocal = 1.0f / scale;
    for (int64_t i = 0; i < count; ++i) {
        float v = DIVIDE ? load(x[i]) / scale : quotient(load(x[i]), scale, reciprocal);
        if (FLOAT) {
            float binade = as_float(as_bits(v) & 0x7F800000u);
            binade = binade > f.lowest ? binade : f.lowest;
            binade = binade < f.highest ? binade : f.highest;
            float anchor = binade * (1.5f * as_float(uint32_t(127 + 23 - f.mantissa) << 23));
            // Without a mantissa bit, codes count binades: every second one starts at an odd code.
            const uint32_t odd = ((as_bits(binade) - as_bits(f.lowest)) >> 23) & uint32_t(f.mantissa == 0);
            anchor = as_float(as_bits(anchor) + odd);
            v = (v + anchor) - anchor;
            v = v > -f.largest ? v : -f.largest;
            v = v < f.largest ? v : f.largest;
        } else {
            v = std::nearbyint(v);
            v = v > f.lowest ? v : f.lowest;
            v = v < f.highest ? v : f.highest;
        }
        codes[i] = uint8_t(int32_t(v * f.unit) + f.zero);
    }
}

template <class T> void round_row(const T* x, int64_t count, float scale, const Format& f, uint8_t* codes) {
    // Remainders underflow where scales are extreme: there the division itself is taken.
    const bool divide = !(scale > 0x1p-60f && scale < 0x1p60f);
    if (f.is_float) divide ? round_run<true, true>(x, count, scale, f, codes) : round_run<true, false>(x, count, scale, f, codes);
    else divide ? round_run<false, true>(x, count, scale, f, codes) : round_run<false, false>(x, count, scale, f, codes);
}

template <class T> float absmax(const T* x, int64_t count) {
    uint32_t largest = 0;  // magnitudes are ordered as their bits are, NaN above all
    for (int64_t i = 0; i < count; ++i) {
        const uint32_t bits = as_bits(load(x[i])) & 0x7FFFFFFFu;
        largest = bits > largest ? bits : largest;
    }
    return as_float(largest);
}

// Scales of rows of `columns` numbers, `rows_of_scale` rows sharing one, and the rows' codes.
template <class T>
void tokens(const T* x, int64_t rows, int64_t columns, int64_t x_pitch, const Format& f, int64_t rows_of_scale, float* scales,
            bool fits, uint8_t* codes, int64_t pitch, int threads) {
    const int64_t count = rows / rows_of_scale;
    if (fits && rows_of_scale > 1)
#pragma omp parallel for num_threads(threads) schedule(static)
        for (int64_t one = 0; one < count; ++one) {
            uint32_t largest = 0;
            for (int64_t row = one * rows_of_scale; row < (one + 1) * rows_of_scale; ++row)
                largest = std::max(largest, as_bits(absmax(x + row * x_pitch, columns)));
            scales[one] = scale_of(as_float(largest), f);
        }
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
        const T* from = x + row * x_pitch;
        float& scale = scales[row / rows_of_scale];
        if (fits && rows_of_scale == 1) scale = scale_of(absmax(from, columns), f);
        uint8_t* to = codes + row * pitch;
        round_row(from, columns, scale, f, to);
        std::memset(to + columns, f.zero, pitch - columns);
    }
}

struct Images {
    int64_t count, channels, height, width;
    int64_t stride_image, stride_channel, stride_y, stride_x;  // in elements
    int64_t kernel_y, kernel_x, step_y, step_x, padding_y, padding_x, dilation_y, dilation_x;
    int64_t out_height, out_width;
    int64_t pitch() const { return (channels + 3) / 4 * 4; }  // bytes of a pixel's codes
    int64_t line() const { return (width + 2 * padding_x) * pitch(); }
    int64_t high() const { return height + 2 * padding_y; }
};

constexpr int64_t TOGETHER = 64;  // channels that are turned to lie last at once

// From planes[channel][pixel] to bytes that lie `pitch` apart for pixels, side by side for channels.
void turn(const uint8_t* planes, int64_t plane, int64_t channels, int64_t pixels, uint8_t* to, int64_t pitch) {
    int64_t pixel = 0;
#if defined(__AVX2__)
    for (; channels % 16 == 0 && pixel + 16 <= pixels; pixel += 16)
        for (int64_t c = 0; c < channels; c += 16) {
            __m128i rows[16], turned[16];
            for (int i = 0; i < 16; ++i)
                rows[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(planes + (c + i) * plane + pixel));
            for (int stage = 0; stage < 4; ++stage) {  // each interleaves the bytes of rows that are eight apart
                for (int i = 0; i < 8; ++i) {
                    turned[2 * i] = _mm_unpacklo_epi8(rows[i], rows[i + 8]);
                    turned[2 * i + 1] = _mm_unpackhi_epi8(rows[i], rows[i + 8]);
                }
                for (int i = 0; i < 16; ++i) rows[i] = turned[i];
            }
            for (int i = 0; i < 16; ++i)
                _mm_storeu_si128(reinterpret_cast<__m128i*>(to + (pixel + i) * pitch + c), rows[i]);
        }
#endif
    for (; pixel < pixels; ++pixel)
        for (int64_t c = 0; c < channels; ++c) to[pixel * pitch + c] = planes[c * plane + pixel];
}

// Some channels of an image whose pixels lie side by side, to codes within their padding; `scratch`: a byte each.
template <class T>
void planes_of_image(const T* x, const Images& m, int64_t channels, float scale, const Format& f, uint8_t* to, uint8_t* scratch) {
    const int64_t plane = m.height * m.width;
    if (m.stride_channel == plane) round_row(x, channels * plane, scale, f, scratch);
    else for (int64_t c = 0; c < channels; ++c) round_row(x + c * m.stride_channel, plane, scale, f, scratch + c * plane);
    for (int64_t y = 0; y < m.height; ++y)
        turn(scratch + y * m.width, plane, channels, m.width, to + y * m.line(), m.pitch());
}

// One line of an image whose channels lie side by side, to codes.
template <class T> void line_of_image(const T* x, const Images& m, float scale, const Format& f, uint8_t* to) {
    if (m.channels == m.pitch() && m.stride_x == m.channels) return round_row(x, m.width * m.channels, scale, f, to);
    for (int64_t column = 0; column < m.width; ++column)
        round_row(x + column * m.stride_x, m.channels, scale, f, to + column * m.pitch());
}

// The largest magnitude of a line of an image.
template <class T> float line_absmax(const T* x, const Images& m) {
    const bool last = m.stride_channel == 1;
    const int64_t runs = last ? m.width : m.channels, stride = last ? m.stride_x : m.stride_channel;
    uint32_t largest = 0;
    for (int64_t run = 0; run < runs; ++run)
        largest = std::max(largest, as_bits(absmax(x + run * stride, last ? m.channels : m.width)));
    return as_float(largest);
}

template <class T>
void images(const T* x, const Images& m, const Format& f, int64_t images_of_scale, float* scales, bool fits, uint8_t* codes,
            int threads) {
    const int64_t lines = m.count * m.height;
    if (fits) {
        const auto of_lines = buffer<float>(lines);
#pragma omp parallel for num_threads(threads) schedule(static)
        for (int64_t one = 0; one < lines; ++one)
            of_lines[one] = line_absmax(x + one / m.height * m.stride_image + one % m.height * m.stride_y, m);
        const int64_t together = images_of_scale * m.height;
        for (int64_t scale = 0; scale < m.count / images_of_scale; ++scale) {
            uint32_t largest = 0;
            for (int64_t one = scale * together; one < (scale + 1) * together; ++one)
                largest = std::max(largest, as_bits(of_lines[one]));
            scales[scale] = scale_of(as_float(largest), f);
        }
    }
    std::memset(codes, f.zero, m.count * m.high() * m.line());
    uint8_t* inside = codes + m.padding_y * m.line() + m.padding_x * m.pitch();
    if (m.stride_channel == 1) {
#pragma omp parallel for num_threads(threads) schedule(static)
        for (int64_t one = 0; one < lines; ++one) {
            const int64_t image = one / m.height, y = one % m.height;
            line_of_image(x + image * m.stride_image + y * m.stride_y, m, scales[image / images_of_scale], f,
                          inside + (image * m.high() + y) * m.line());
        }
        return;
    }
    const int64_t parts = (m.channels + TOGETHER - 1) / TOGETHER;
#pragma omp parallel num_threads(threads)
    {
        const auto scratch = buffer<uint8_t>(TOGETHER * m.height * m.width);
#pragma omp for schedule(static)
        for (int64_t one = 0; one < m.count * parts; ++one) {
            const int64_t image = one / parts, first = one % parts * TOGETHER;
            planes_of_image(x + image * m.stride_image + first * m.stride_channel, m, std::min(TOGETHER, m.channels - first),
                            scales[image / images_of_scale], f, inside + image * m.high() * m.line() + first, scratch.get());
        }
    }
}

struct Weights {
    const uint8_t* packed;
    int64_t packed_pitch, bits;
    const int8_t* tables;    // [factors][2^bits]: the value of a code, times 0, 1, 2, ...
    const uint8_t* factors;  // [outputs][groups]
    int64_t groups, size;
    int64_t outputs, segments, columns;  // columns of each segment
    int64_t padded() const { return (columns + 3) / 4 * 4; }
    int64_t quads() const { return segments * padded() / 4; }
};

// The weights of one output, in the order of its columns.
void expand_row(const Weights& w, int64_t output, int8_t* to) {
    const uint8_t *codes = w.packed + output * w.packed_pitch, *factors = w.factors + output * w.groups;
    const int64_t columns = w.segments * w.columns, entries = int64_t(1) << w.bits;
    int64_t column = 0;
#if defined(__AVX2__)
    if (w.bits == 4 && w.size % 16 == 0) {
        const __m128i low = _mm_set1_epi8(15);
        int64_t group = 0, inside = 0;
        for (; column + 32 <= columns; column += 32) {
            const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + column / 2));
            const __m128i even = _mm_and_si128(bytes, low), odd = _mm_and_si128(_mm_srli_epi16(bytes, 4), low);
            const __m128i halves[2] = {_mm_unpacklo_epi8(even, odd), _mm_unpackhi_epi8(even, odd)};
            for (int half = 0; half < 2; ++half) {
                const int8_t* table = w.tables + factors[group] * entries;
                const __m128i values = _mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)), halves[half]);
                _mm_storeu_si128(reinterpret_cast<__m128i*>(to + column + 16 * half), values);
                if ((inside += 16) == w.size) { inside = 0; ++group; }
            }
        }
    }
#endif
    const uint32_t mask = uint32_t(entries - 1);
    for (; column < columns; ++column) {
        const int64_t bit = column * w.bits, byte = bit / 8;
        uint32_t word = codes[byte];
        if (bit % 8 + w.bits > 8) word |= uint32_t(codes[byte + 1]) << 8;
        to[column] = w.tables[factors[column / w.size] * entries + ((word >> (bit % 8)) & mask)];
    }
}

constexpr int64_t LANES = 16;  // outputs that share a cache line of a panel

// The quads of LANES rows side by side: rows[lane][quad] to lines[quad][lane], lines `wide` quads apart.
void interleave(const int8_t* rows, int64_t pitch, int64_t quads, int64_t wide, int8_t* lines) {
    int64_t quad = 0;
#if defined(__AVX2__)
    for (; quad + 8 <= quads; quad += 8)
        for (int64_t lane = 0; lane < LANES; lane += 8) {
            __m256i r[8], t[8];
            for (int i = 0; i < 8; ++i)
                r[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows + (lane + i) * pitch + quad * 4));
            for (int i = 0; i < 8; i += 2) {
                t[i] = _mm256_unpacklo_epi32(r[i], r[i + 1]);
                t[i + 1] = _mm256_unpackhi_epi32(r[i], r[i + 1]);
            }
            for (int i = 0; i < 8; i += 4)
                for (int j = 0; j < 2; ++j) {
                    r[i + 2 * j] = _mm256_unpacklo_epi64(t[i + j], t[i + 2 + j]);
                    r[i + 2 * j + 1] = _mm256_unpackhi_epi64(t[i + j], t[i + 2 + j]);
                }
            for (int i = 0; i < 4; ++i) {
                t[i] = _mm256_permute2x128_si256(r[i], r[i + 4], 0x20);
                t[i + 4] = _mm256_permute2x128_si256(r[i], r[i + 4], 0x31);
            }
            for (int i = 0; i < 8; ++i)
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(lines + (quad + i) * wide * 4 + lane * 4), t[i]);
        }
#endif
    for (; quad < quads; ++quad)
        for (int64_t n = 0; n < LANES; ++n) std::memcpy(lines + (quad * wide + n) * 4, rows + n * pitch + quad * 4, 4);
}

// `wide` outputs from `first` on as a panel, and the sum of each one's weights; `rows` is room for LANES rows of columns.
void expand_panel(const Weights& w, int64_t first, int64_t wide, int8_t* panel, int32_t* sums, int8_t* rows) {
    const int64_t pitch = w.quads() * 4, padded = w.padded();
    for (int64_t lane = 0; lane < wide; lane += LANES) {
        for (int64_t n = 0; n < LANES; ++n) {
            int8_t* row = rows + n * pitch;
            const int64_t output = first + lane + n;
            if (output >= w.outputs) {
                std::memset(row, 0, pitch);
            } else {
                expand_row(w, output, row);
                // From the last segment on, each to its place: a segment ends on a whole quad.
                for (int64_t segment = w.segments - 1; padded > w.columns && segment >= 0; --segment) {
                    std::memmove(row + segment * padded, row + segment * w.columns, w.columns);
                    std::memset(row + segment * padded + w.columns, 0, padded - w.columns);
                }
            }
        }
        interleave(rows, pitch, w.quads(), wide, panel + lane * 4);
        for (int64_t n = 0; n < LANES; ++n) {
            int32_t sum = 0;
            for (int64_t c = 0; c < pitch; ++c) sum += rows[n * pitch + c];
            sums[lane + n] = sum;
        }
    }
}

// Where the inputs of output rows lie: a row is a pixel (y, x) of an image, and columns come in segments.
struct Inputs {
    const uint8_t* codes;
    int64_t image_pitch, y_pitch, x_pitch, height, width;
    const int64_t* segments;
    const uint8_t* begin(int64_t row) const {
        const int64_t image = row / (height * width), pixel = row % (height * width);
        return codes + image * image_pitch + pixel / width * y_pitch + pixel % width * x_pitch;
    }
};

using Begins = const uint8_t* const*;

template <int ROWS>
void tile_portable(Begins begins, const int64_t* offsets, const int8_t* panel, int64_t segments, int64_t quads, int32_t* sums) {
    constexpr int WIDE = 16;
    std::fill(sums, sums + ROWS * WIDE, 0);
    for (int64_t segment = 0; segment < segments; ++segment)
        for (int64_t quad = 0; quad < quads; ++quad, panel += WIDE * 4)
            for (int r = 0; r < ROWS; ++r) {
                const uint8_t* from = begins[r] + offsets[segment] + quad * 4;
                for (int n = 0; n < WIDE; ++n)
                    for (int j = 0; j < 4; ++j) sums[r * WIDE + n] += int32_t(from[j]) * panel[n * 4 + j];
            }
}

#if defined(__AVX2__)
inline __m256i four(const uint8_t* from) { int32_t bytes; std::memcpy(&bytes, from, 4); return _mm256_set1_epi32(bytes); }

// Pairs of products are summed in 16 bits, and TOGETHER of these sums again: the caller sees to it that none overflows.
template <int ROWS, int TOGETHER>
void tile_avx2(Begins begins, const int64_t* offsets, const int8_t* panel, int64_t segments, int64_t quads, int32_t* sums) {
    __m256i total[ROWS][2];
    for (int r = 0; r < ROWS; ++r) total[r][0] = total[r][1] = _mm256_setzero_si256();
    const __m256i ones = _mm256_set1_epi16(1);
    for (int64_t segment = 0; segment < segments; ++segment) {
        const uint8_t* from[ROWS];
        for (int r = 0; r < ROWS; ++r) from[r] = begins[r] + offsets[segment];
        int64_t quad = 0;
        for (; quad + TOGETHER <= quads; quad += TOGETHER, panel += TOGETHER * 64) {
            const __m256i* w = reinterpret_cast<const __m256i*>(panel);
            for (int r = 0; r < ROWS; ++r) {
                __m256i pairs[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
                for (int t = 0; t < TOGETHER; ++t) {
                    const __m256i x = four(from[r] + (quad + t) * 4);
                    for (int v = 0; v < 2; ++v) {
                        const __m256i product = _mm256_maddubs_epi16(x, _mm256_load_si256(w + 2 * t + v));
                        pairs[v] = t ? _mm256_add_epi16(pairs[v], product) : product;
                    }
                }
                for (int v = 0; v < 2; ++v) total[r][v] = _mm256_add_epi32(total[r][v], _mm256_madd_epi16(pairs[v], ones));
            }
        }
        for (; quad < quads; ++quad, panel += 64)
            for (int r = 0; r < ROWS; ++r)
                for (int v = 0; v < 2; ++v) {
                    const __m256i w = _mm256_load_si256(reinterpret_cast<const __m256i*>(panel) + v);
                    const __m256i pairs = _mm256_maddubs_epi16(four(from[r] + quad * 4), w);
                    total[r][v] = _mm256_add_epi32(total[r][v], _mm256_madd_epi16(pairs, ones));
                }
    }
    for (int r = 0; r < ROWS; ++r)
        for (int v = 0; v < 2; ++v) _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums + r * 16 + v * 8), total[r][v]);
}
#endif

#if defined(__AVXVNNI__) || (defined(__AVX512VNNI__) && defined(__AVX512VL__))
#if defined(__AVXVNNI__)
#define DOT256 _mm256_dpbusd_avx_epi32
#else
#define DOT256 _mm256_dpbusd_epi32
#endif
#define HAS_VNNI 1
template <int ROWS>
void tile_avx_vnni(Begins begins, const int64_t* offsets, const int8_t* panel, int64_t segments, int64_t quads, int32_t* sums) {
    __m256i total[ROWS][2];
    for (int r = 0; r < ROWS; ++r) total[r][0] = total[r][1] = _mm256_setzero_si256();
    for (int64_t segment = 0; segment < segments; ++segment) {
        const uint8_t* from[ROWS];
        for (int r = 0; r < ROWS; ++r) from[r] = begins[r] + offsets[segment];
        for (int64_t quad = 0; quad < quads; ++quad, panel += 64) {
            const __m256i* w = reinterpret_cast<const __m256i*>(panel);
            const __m256i w0 = _mm256_load_si256(w), w1 = _mm256_load_si256(w + 1);
            for (int r = 0; r < ROWS; ++r) {
                const __m256i x = four(from[r] + quad * 4);
                total[r][0] = DOT256(total[r][0], x, w0);
                total[r][1] = DOT256(total[r][1], x, w1);
            }
        }
    }
    for (int r = 0; r < ROWS; ++r)
        for (int v = 0; v < 2; ++v) _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums + r * 16 + v * 8), total[r][v]);
}
#endif

#if defined(__AVX512VNNI__)
template <int ROWS>
void tile_avx512(Begins begins, const int64_t* offsets, const int8_t* panel, int64_t segments, int64_t quads, int32_t* sums) {
    __m512i total[ROWS][4];
    for (int r = 0; r < ROWS; ++r)
        for (int v = 0; v < 4; ++v) total[r][v] = _mm512_setzero_si512();
    for (int64_t segment = 0; segment < segments; ++segment) {
        const uint8_t* from[ROWS];
        for (int r = 0; r < ROWS; ++r) from[r] = begins[r] + offsets[segment];
        for (int64_t quad = 0; quad < quads; ++quad, panel += 256) {
            __m512i w[4];
            for (int v = 0; v < 4; ++v) w[v] = _mm512_load_si512(panel + 64 * v);
            for (int r = 0; r < ROWS; ++r) {
                int32_t bytes;
                std::memcpy(&bytes, from[r] + quad * 4, 4);
                const __m512i x = _mm512_set1_epi32(bytes);
                for (int v = 0; v < 4; ++v) total[r][v] = _mm512_dpbusd_epi32(total[r][v], x, w[v]);
            }
        }
    }
    for (int r = 0; r < ROWS; ++r)
        for (int v = 0; v < 4; ++v) _mm512_storeu_si512(sums + r * 64 + v * 16, total[r][v]);
}
#endif

using Tile = void (*)(Begins, const int64_t*, const int8_t*, int64_t, int64_t, int32_t*);

#define UP_TO_6(name, ...) {name<1 __VA_ARGS__>, name<2 __VA_ARGS__>, name<3 __VA_ARGS__>, name<4 __VA_ARGS__>, name<5 __VA_ARGS__>, name<6 __VA_ARGS__>}

constexpr int MOST_ROWS = 6;

// Tiles of 1 to 6 rows; `together` is the number of sums of pairs that fit 16 bits.
const Tile* tiles(int level, int64_t together) {
#if defined(__AVX512VNNI__)
    static const Tile avx512[] = UP_TO_6(tile_avx512);
    if (level == AVX512_VNNI) return avx512;
#endif
#if defined(HAS_VNNI)
    static const Tile vnni[] = UP_TO_6(tile_avx_vnni);
    if (level == AVX_VNNI) return vnni;
#endif
#if defined(__AVX2__)
    static const Tile one[] = UP_TO_6(tile_avx2, , 1), two[] = UP_TO_6(tile_avx2, , 2);
    static const Tile four_[] = UP_TO_6(tile_avx2, , 4);
    if (level == AVX2) return together >= 4 ? four_ : together >= 2 ? two : one;
#endif
    static const Tile portable[] = UP_TO_6(tile_portable);
    return portable;
}

// A layer: its weight, in two halves where the input is a concatenation of two, and what becomes of the sums.
struct Plan {
    Format format;
    int32_t level, halves;
    int64_t together;  // sums of pairs of products that fit 16 bits
    Weights weights[2];
    const int8_t* panels[2];  // expanded weights, or null
    const int32_t* sums[2];
    const float* of_outputs[2];
    const void* bias;
    int32_t bias_is_bfloat16;
};

// The sums of a run of outputs to results: off with the zeros, times both scales, plus the bias or what is there already.
template <class T>
inline void finish_row(const int32_t* sums, int64_t some, const int32_t* of_weights, int32_t zero, const float* of_outputs,
                       float scale, const float* added, T* to) {
    if (added)
        for (int64_t n = 0; n < some; ++n) store(float(sums[n] - zero * of_weights[n]) * of_outputs[n] * scale + added[n], to[n]);
    else
        for (int64_t n = 0; n < some; ++n) store(float(sums[n] - zero * of_weights[n]) * of_outputs[n] * scale, to[n]);
}

template <class T>
void finish(const int32_t* sums, int64_t wide, int rows, int64_t row, int64_t first, int64_t some, const int32_t* of_weights,
            const Plan& plan, int half, const float* scales, int64_t rows_of_scale, const float* bias, const float* added,
            T* out) {
    const int64_t pitch = plan.weights[0].outputs;
    const float* of_outputs = plan.of_outputs[half] + first;
    for (int r = 0; r < rows; ++r) {
        const float scale = scales[(row + r) / rows_of_scale];
        const float* more = added ? added + (row + r) * pitch + first : bias ? bias + first : nullptr;
        T* to = out + (row + r) * pitch + first;
        // A length that the compiler knows makes a loop without ends.
        if (some == 64) finish_row(sums + r * wide, 64, of_weights, plan.format.zero, of_outputs, scale, more, to);
        else if (some == 16) finish_row(sums + r * wide, 16, of_weights, plan.format.zero, of_outputs, scale, more, to);
        else finish_row(sums + r * wide, some, of_weights, plan.format.zero, of_outputs, scale, more, to);
    }
}

template <class T>
void product(const Plan& plan, int half, const Inputs& a, int64_t rows, const float* scales, int64_t rows_of_scale,
             const float* bias, const float* added, T* out, int threads) {
    const Weights& w = plan.weights[half];
    const int8_t* expanded = plan.panels[half];
    const int64_t wide = wide_of(plan.level), panels = (w.outputs + wide - 1) / wide, bytes = w.quads() * wide * 4;
    const Tile* tile = tiles(plan.level, plan.together);
    // Enough pieces for all threads; a piece expands its panel anew, so none is smaller than it must be.
    int64_t pieces = panels >= threads ? 1 : std::min((threads + panels - 1) / panels, (rows + 63) / 64);
    pieces = std::max<int64_t>(pieces, 1);
    const int64_t of_piece = ((rows + pieces - 1) / pieces + MOST_ROWS - 1) / MOST_ROWS * MOST_ROWS;
#pragma omp parallel num_threads(threads)
    {
        const auto panel = buffer<int8_t>(expanded ? 0 : bytes), row_of = buffer<int8_t>(expanded ? 0 : LANES * w.quads() * 4);
        const auto of_weights = buffer<int32_t>(wide), sums = buffer<int32_t>(MOST_ROWS * wide);
#pragma omp for schedule(dynamic) collapse(2)
        for (int64_t p = 0; p < panels; ++p)
            for (int64_t piece = 0; piece < pieces; ++piece) {
                const int64_t first = p * wide, some = std::min(wide, w.outputs - first);
                if (!expanded) expand_panel(w, first, wide, panel.get(), of_weights.get(), row_of.get());
                const int8_t* now = expanded ? expanded + p * bytes : panel.get();
                const int32_t* their_sums = expanded ? plan.sums[half] + first : of_weights.get();
                const int64_t last = std::min(rows, (piece + 1) * of_piece);
                for (int64_t row = piece * of_piece; row < last; row += MOST_ROWS) {
                    const int many = int(std::min<int64_t>(MOST_ROWS, last - row));
                    const uint8_t* begins[MOST_ROWS];
                    for (int r = 0; r < many; ++r) begins[r] = a.begin(row + r);
                    tile[many - 1](begins, a.segments, now, w.segments, w.padded() / 4, sums.get());
                    finish(sums.get(), wide, many, row, first, some, their_sums, plan, half, scales, rows_of_scale, bias, added, out);
                }
            }
    }
}

// Both halves one after the other, summed in float32; `rounds(half, first channel, codes, scales)` makes the codes of one.
template <class T, class Rounds>
void halves(const Plan& plan, const Inputs& shape, int64_t rows, int64_t code_bytes, const float* given, int64_t scale_count,
            T* out, int threads, Rounds rounds) {
    const auto codes = buffer<uint8_t>(code_bytes);
    const auto scales = buffer<float>(scale_count);
    const auto partial = buffer<float>(plan.halves == 2 ? rows * plan.weights[0].outputs : 0);
    const auto wide_bias = buffer<float>(plan.bias_is_bfloat16 ? plan.weights[0].outputs : 0);
    const float* bias = static_cast<const float*>(plan.bias);
    if (plan.bias_is_bfloat16) {
        for (int64_t n = 0; n < plan.weights[0].outputs; ++n) wide_bias[n] = load(static_cast<const uint16_t*>(plan.bias)[n]);
        bias = wide_bias.get();
    }
    int64_t channel = 0;
    for (int half = 0; half < plan.halves; ++half) {
        if (given) std::copy(given, given + scale_count, scales.get());
        Inputs a = shape;
        a.codes = codes.get();
        rounds(half, channel, a, scales.get());
        const int64_t rows_of_scale = rows / scale_count;
        const float* added = half ? partial.get() : nullptr;
        if (half + 1 < plan.halves)
            product(plan, half, a, rows, scales.get(), rows_of_scale, bias, added, partial.get(), threads);
        else product(plan, half, a, rows, scales.get(), rows_of_scale, bias, added, out, threads);
        channel += plan.weights[half].columns;
    }
}

int fewer(int threads, int64_t products) {  // a thread is worth starting for a tenth of a millisecond's work
    return int(std::max<int64_t>(1, std::min<int64_t>(threads, products >> 23)));
}

template <class T>
void run(const Plan& plan, const T* x, int64_t rows, int64_t channels, int64_t rows_of_scale, const float* given, T* out,
         int threads) {
    threads = fewer(threads, rows * plan.weights[0].outputs * channels);
    const int64_t scale_count = rows / rows_of_scale, zero = 0;
    Inputs shape{nullptr, 0, 0, 0, 1, 1, &zero};
    halves(plan, shape, rows, rows * (channels + 3) / 4 * 4 + 4 * rows, given, scale_count, out, threads,
           [&](int half, int64_t first, Inputs& a, float* scales) {
               a.image_pitch = plan.weights[half].padded();
               tokens(x + first, rows, plan.weights[half].columns, channels, plan.format, rows_of_scale, scales, !given,
                      const_cast<uint8_t*>(a.codes), a.image_pitch, threads);
           });
}

template <class T>
void run(const Plan& plan, const T* x, const Images& m, int64_t images_of_scale, const float* given, T* out, int threads) {
    const int64_t rows = m.count * m.out_height * m.out_width;
    threads = fewer(threads, rows * plan.weights[0].outputs * m.channels * m.kernel_y * m.kernel_x);
    const auto segments = buffer<int64_t>(m.kernel_y * m.kernel_x);
    halves(plan, Inputs{}, rows, m.count * m.high() * m.line(), given, m.count / images_of_scale, out, threads,
           [&](int half, int64_t first, Inputs& a, float* scales) {
               Images one = m;
               one.channels = plan.weights[half].columns;
               const int64_t line = one.line(), pixel = one.pitch();
               for (int64_t y = 0; y < m.kernel_y; ++y)
                   for (int64_t i = 0; i < m.kernel_x; ++i)
                       segments[y * m.kernel_x + i] = y * m.dilation_y * line + i * m.dilation_x * pixel;
               a = Inputs{a.codes, one.high() * line, m.step_y * line, m.step_x * pixel, m.out_height, m.out_width, segments.get()};
               images(x + first * m.stride_channel, one, plan.format, images_of_scale, scales, !given,
                      const_cast<uint8_t*>(a.codes), threads);
           });
}

}  // namespace

extern "C" {

// The best of the levels that this was compiled for.
int best_level() {
#if defined(__AVX512VNNI__)
    return AVX512_VNNI;
#elif defined(HAS_VNNI)
    return AVX_VNNI;
#elif defined(__AVX2__)
    return AVX2;
#else
    return PORTABLE;
#endif
}

int64_t panel_width(int level) { return wide_of(level); }

void expand(const Plan* plan, int half, int8_t* panels, int32_t* sums) {
    const Weights& w = plan->weights[half];
    const int64_t wide = wide_of(plan->level), bytes = w.quads() * wide * 4;
    const auto row = buffer<int8_t>(LANES * w.quads() * 4);
    for (int64_t first = 0; first < w.outputs; first += wide)
        expand_panel(w, first, wide, panels + first / wide * bytes, sums + first, row.get());
}

// x (rows, channels) to out (rows, outputs), both float32 or both bfloat16.
void run_tokens(const Plan* plan, const void* x, int is_bfloat16, int64_t rows, int64_t channels, int64_t rows_of_scale,
                const float* given, void* out, int threads) {
    if (is_bfloat16)
        run(*plan, static_cast<const uint16_t*>(x), rows, channels, rows_of_scale, given, static_cast<uint16_t*>(out), threads);
    else run(*plan, static_cast<const float*>(x), rows, channels, rows_of_scale, given, static_cast<float*>(out), threads);
}

// x (count, channels, height, width), of the strides given, to out (count, out_height, out_width, outputs).
void run_images(const Plan* plan, const void* x, int is_bfloat16, const Images* images, int64_t images_of_scale,
                const float* given, void* out, int threads) {
    if (is_bfloat16)
        run(*plan, static_cast<const uint16_t*>(x), *images, images_of_scale, given, static_cast<uint16_t*>(out), threads);
    else run(*plan, static_cast<const float*>(x), *images, images_of_scale, given, static_cast<float*>(out), threads);
}

}
