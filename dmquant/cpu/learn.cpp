// The parts of a learned rounding that are no matrix products, each one pass over the weights: AdaRound's soft weights,
// their gradient, and the gradient of its penalty (dmquant/rounding/adaround.py).
//
// Without fused multiplications and additions (-ffp-contract=off) every machine computes the same.

#include <cstdint>
#include <cstring>

constexpr int LANES = 16;
typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));

constexpr int FRACTION_BITS = 23, BIAS = 127;
constexpr float TO_INTEGER = 12582912.0f;  // 1.5 * 2^23: added and taken away, it rounds to integers
constexpr float LOG2_E = 1.44269504f, LN2_HIGH = 0.693359375f, LN2_LOW = -2.12194440e-4f;

static inline Floats all(float value) { return Floats{} + value; }
static inline Floats held(Floats x, float low, float high) {
    x = x < low ? all(low) : x;  // NaN stays
    return x > high ? all(high) : x;
}
static inline Floats loaded(const float* from, int64_t count) {
    Floats x{};
    if (count >= LANES) std::memcpy(&x, from, sizeof x);
    else std::memcpy(&x, from, 4 * count);
    return x;
}
static inline void store(float* to, const Floats& x, int64_t count) {
    if (count >= LANES) std::memcpy(to, &x, sizeof x);
    else std::memcpy(to, &x, 4 * count);
}

// e^x to 2 units in the last place: 2^n times a polynomial in |r| <= ln(2) / 2 (Cephes, expf).
static inline Floats exponential(Floats x) {
    x = held(x, -87.0f, 88.0f);
    const Floats n = (x * LOG2_E + TO_INTEGER) - TO_INTEGER;
    const Floats r = (x - n * LN2_HIGH) - n * LN2_LOW;
    Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = (p * r * r + r) + 1.0f;
    const Ints power = (__builtin_convertvector(n, Ints) + BIAS) << FRACTION_BITS;
    return p * (Floats)power;
}

// ln(x) of normal numbers, to 1e-7: the exponent, and a polynomial in the fraction from sqrt(1/2) on (Cephes, logf).
static inline Floats logarithm(Floats x) {
    const Ints bits = (Ints)x, high = (bits & 0x7FFFFF) > 0x3504F3;  // -1 where the fraction is above sqrt(2)
    const Floats n = __builtin_convertvector((bits >> FRACTION_BITS) - BIAS - high, Floats);
    const Floats f = (Floats)((bits & 0x7FFFFF) | ((BIAS + high) << FRACTION_BITS)) - 1.0f, z = f * f;
    Floats p = f * 7.0376836292e-2f - 1.1514610310e-1f;
    p = p * f + 1.1676998740e-1f;
    p = p * f - 1.2420140846e-1f;
    p = p * f + 1.4249322787e-1f;
    p = p * f - 1.6668057665e-1f;
    p = p * f + 2.0000714765e-1f;
    p = p * f - 2.4999993993e-1f;
    p = p * f + 3.3333331174e-1f;
    p = (p * f * z + n * LN2_LOW) - z * 0.5f;
    return (f + p) + n * LN2_HIGH;
}

// h(v) = clip(zeta' sigmoid(v) + gamma, 0, 1) and its slope.
struct Gate {
    Floats value, slope;

    Gate(Floats v, float stretch, float gamma) {
        const Floats s = 1.0f / (1.0f + exponential(-v)), open = s * stretch + gamma;
        value = held(open, 0.0f, 1.0f);
        const Ints inside = (open >= 0.0f) & (open <= 1.0f);
        slope = (Floats)((Ints)(s * (1.0f - s) * stretch) & inside);
    }
};

// `step` is null where V is learned, or what V' = V step is divided by.
struct Variables {
    const float *v, *step;
    float stretch, gamma;

    Gate gate(int64_t at, int64_t count) const {
        Floats x = loaded(v + at, count);
        if (step) x /= divisor(at, count);
        return Gate(x, stretch, gamma);
    }
    Floats divisor(int64_t at, int64_t count) const { return loaded(step + at, count); }
    Floats to_v(Floats gradient, int64_t at, int64_t count) const {
        return step ? gradient / divisor(at, count) : gradient;
    }
};

template <class Body>
static void each(int threads, int64_t count, const Body& body) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t at = 0; at <= count - LANES; at += LANES) body(at, LANES);
    if (const int64_t left = count % LANES) body(count - left, left);
}

extern "C" {

// lower + h (upper - lower), from the nearer end, as torch.lerp.
void soft_weights(
    int threads, int64_t count, float stretch, float gamma, const float* v, const float* step, const float* lower,
    const float* upper, float* to
) {
    const Variables variables{v, step, stretch, gamma};
    each(threads, count, [&](int64_t at, int64_t left) {
        const Floats low = loaded(lower + at, left), high = loaded(upper + at, left);
        const Floats h = variables.gate(at, left).value, gap = high - low;
        store(to + at, h < 0.5f ? low + h * gap : high - gap * (1.0f - h), left);
    });
}

// The gradient by V of soft weights, from theirs.
void soft_gradient(
    int threads, int64_t count, float stretch, float gamma, const float* v, const float* step, const float* lower,
    const float* upper, const float* gradient, float* to
) {
    const Variables variables{v, step, stretch, gamma};
    each(threads, count, [&](int64_t at, int64_t left) {
        const Floats gap = loaded(upper + at, left) - loaded(lower + at, left);
        const Floats by_gate = loaded(gradient + at, left) * gap;
        store(to + at, variables.to_v(by_gate * variables.gate(at, left).slope, at, left), left);
    });
}

// Adds to a gradient by V that of factor * sum(1 - |2 h - 1|^beta).
void penalty_gradient(
    int threads, int64_t count, float stretch, float gamma, const float* v, const float* step, float beta, float factor,
    float* gradient
) {
    const Variables variables{v, step, stretch, gamma};
    each(threads, count, [&](int64_t at, int64_t left) {
        const Gate gate = variables.gate(at, left);
        const Floats x = 2.0f * gate.value - 1.0f, far = x < 0.0f ? -x : x;
        const Floats power = exponential(logarithm(far < 1e-30f ? all(1e-30f) : far) * (beta - 1.0f));
        const Floats by_far = far == 0.0f ? Floats{} : power * (-2.0f * beta * factor);
        const Floats by_v = (x < 0.0f ? -by_far : by_far) * gate.slope;
        store(gradient + at, loaded(gradient + at, left) + variables.to_v(by_v, at, left), left);
    });
}
}
