// Codes of 4 bits and float32 scales to the weights that they stand for, each product rounded once to the output's type.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__SSSE3__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace {

// Values of `count` codes, the first in the low half of the first byte, by a table of 16.
void look_up(const uint8_t* codes, const int8_t* table, int8_t* values, int64_t count) {
    int64_t at = 0;
#if defined(__SSSE3__)
    const __m128i entries = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table)), low = _mm_set1_epi8(15);
    for (; at + 32 <= count; at += 32) {
        const __m128i pairs = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + at / 2));
        const __m128i first = _mm_shuffle_epi8(entries, _mm_and_si128(pairs, low));
        const __m128i second = _mm_shuffle_epi8(entries, _mm_and_si128(_mm_srli_epi16(pairs, 4), low));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(values + at), _mm_unpacklo_epi8(first, second));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(values + at + 16), _mm_unpackhi_epi8(first, second));
    }
#elif defined(__aarch64__)
    const int8x16_t entries = vld1q_s8(table);
    for (; at + 32 <= count; at += 32) {
        const uint8x16_t pairs = vld1q_u8(codes + at / 2);
        const int8x16_t first = vqtbl1q_s8(entries, vandq_u8(pairs, vdupq_n_u8(15)));
        vst2q_s8(values + at, {{first, vqtbl1q_s8(entries, vshrq_n_u8(pairs, 4))}});
    }
#endif
    for (; at < count; at++) values[at] = table[(codes[at / 2] >> (4 * (at & 1))) & 15];
}

inline void store(float value, float* out) { *out = value; }

// bfloat16: to the nearest, ties to even.
inline void store(float value, uint16_t* out) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    *out = static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// One row of whole groups of a size that the compiler knows: short loops of unknown length take four times as long.
template <int64_t Group, class Out>
void scale_row(const int8_t* values, const float* scales, float step, Out* out, int64_t columns) {
    for (int64_t start = 0; start < columns; start += Group, scales++)
        for (int64_t i = 0; i < Group; i++) store(values[start + i] * step * *scales, out + start + i);
}

template <class Out>
void scale_row(const int8_t* values, const float* scales, float step, Out* out, int64_t columns, int64_t group) {
    if (group == 16 && columns % 16 == 0) return scale_row<16>(values, scales, step, out, columns);
    if (group == 32 && columns % 32 == 0) return scale_row<32>(values, scales, step, out, columns);
    if (group == 64 && columns % 64 == 0) return scale_row<64>(values, scales, step, out, columns);
    for (int64_t start = 0; start < columns; start += group, scales++) {
        const int64_t end = std::min(start + group, columns);
        const float scale = *scales;
        for (int64_t i = start; i < end; i++) store(values[i] * step * scale, out + i);
    }
}

template <class Out>
void expand(const uint8_t* codes, const float* scales, const int8_t* table, float step, Out* out, int64_t rows,
            int64_t columns, int64_t group, int threads) {
    const int64_t groups = (columns + group - 1) / group, bytes = (columns + 1) / 2;
#pragma omp parallel num_threads(threads)
    {
        std::vector<int8_t> values(columns);
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; row++) {
            look_up(codes + row * bytes, table, values.data(), columns);
            scale_row(values.data(), scales + row * groups, step, out + row * columns, columns, group);
        }
    }
}

}  // namespace

extern "C" void expand_float32(const uint8_t* codes, const float* scales, const int8_t* table, float step, float* out,
                               int64_t rows, int64_t columns, int64_t group, int threads) {
    expand(codes, scales, table, step, out, rows, columns, group, threads);
}

extern "C" void expand_bfloat16(const uint8_t* codes, const float* scales, const int8_t* table, float step,
                                uint16_t* out, int64_t rows, int64_t columns, int64_t group, int threads) {
    expand(codes, scales, table, step, out, rows, columns, group, threads);
}
