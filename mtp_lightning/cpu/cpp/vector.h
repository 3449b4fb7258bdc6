// Vectors of fp32 numbers, LANES of them: one register.
//
// Uses the compiler's vector types. setup.py builds all C++ twice, for the instructions of AVX-512
// and for those of AVX2; what differs is in avx512.h and avx2.h.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#ifdef __AVX512F__
constexpr int64_t LANES = 16;
constexpr int REGISTERS = 32;
#else
constexpr int64_t LANES = 8;
constexpr int REGISTERS = 16;
#endif

typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef float Loose __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t Whole __attribute__((vector_size(4 * LANES)));
typedef int32_t LooseWhole __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// n, rounded up to whole vectors.
static inline int64_t padded(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

static inline Vector load(const float* from) { return *(const Loose*)from; }
static inline void store(float* to, Vector x) { *(Loose*)to = x; }
static inline Vector broadcast(float x) { return x - (Vector){}; }

// A mask of the lanes from `at` on: all ones for those before `end`.
static inline Whole lanes_before(int64_t at, int64_t end) {
    Whole lanes;
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) lanes[i] = i;
    return lanes < (int32_t)(end - at) - (Whole){};
}

// a * b + c, rounded once. Used where a sum must have the same bits in loops of any shape: on its own,
// the compiler rounds twice in some of them.
static inline Vector multiply_add(Vector a, Vector b, Vector c);

#ifdef __AVX512F__
#include "avx512.h"
#else
#include "avx2.h"
#endif

// Calls body(at, n) for all columns, n <= LANES at a time.
template <typename Body>
static inline void columns(int64_t width, Body body) {
    int64_t at = 0;
    for (; at + LANES <= width; at += LANES) body(at, LANES);
    if (at < width) body(at, width - at);
}

static inline Vector take(const float* from, int64_t n) {
    return n == LANES ? load(from) : load_some(from, n);
}

static inline void put(float* to, Vector x, int64_t n) {
    n == LANES ? store(to, x) : store_some(to, x, n);
}

// One step of a transposition: exchanges blocks of STEP lanes.
template <int STEP>
static inline void exchange(Vector* rows) {
    Whole upper, lower;
#pragma GCC unroll 16
    for (int j = 0; j < LANES; j++) {
        upper[j] = j & STEP ? LANES + j - STEP : j;
        lower[j] = j & STEP ? LANES + j : j + STEP;
    }
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) {
        if (i & STEP) continue;
        Vector a = rows[i], b = rows[i + STEP];
        rows[i] = __builtin_shuffle(a, b, upper);
        rows[i + STEP] = __builtin_shuffle(a, b, lower);
    }
}

static inline void transpose(Vector* rows) {
    if constexpr (LANES == 16) exchange<8>(rows);
    exchange<4>(rows);
    exchange<2>(rows);
    exchange<1>(rows);
}

static inline Vector larger(Vector a, Vector b) { return a > b ? a : b; }
static inline Vector absolute(Vector x) { return x < broadcast(0.0f) ? -x : x; }

typedef float Eight __attribute__((vector_size(32)));
typedef float Four __attribute__((vector_size(16)));

// The lanes of a vector combined into four, the upper half with the lower one.
template <typename Combine>
static inline Four folded_to_four(Vector x, Combine combine) {
    Eight eights[LANES / 8];
    Four fours[2];
    memcpy(eights, &x, sizeof(x));
    if constexpr (LANES == 16) eights[0] = combine(eights[0], eights[1]);
    memcpy(fours, eights, sizeof(fours));
    return combine(fours[0], fours[1]);
}

static inline float sum_lanes(Vector x) {
    Four four = folded_to_four(x, [](auto a, auto b) { return a + b; });
    return (four[0] + four[2]) + (four[1] + four[3]);
}

static inline float max_lane(Vector x) {
    Four four = folded_to_four(x, [](auto a, auto b) { return a > b ? a : b; });
    float a = four[0] > four[2] ? four[0] : four[2], b = four[1] > four[3] ? four[1] : four[3];
    return a > b ? a : b;
}

// exp to about one unit in the last place; below -87 it returns about 1e-38, and infinity on overflow.
// NaN stays NaN.
static inline Vector exp_of(Vector given) {
    const Vector most = broadcast(88.72283f);  // the largest x without overflow
    Vector x = given < broadcast(-87.0f) ? broadcast(-87.0f) : given;
    x = x > most ? most : x;
    const Vector magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    Vector shifted = x * broadcast(1.44269504088896341f) + magic;
    Vector n = shifted - magic;
    Vector r = x - n * broadcast(0.693359375f);
    r = r - n * broadcast(-2.12194440e-4f);
    // Polynomial for |r| <= ln(2) / 2 (Cephes' expf).
    Vector p = broadcast(1.9875691500e-4f);
    p = p * r + broadcast(1.3981999507e-3f);
    p = p * r + broadcast(8.3334519073e-3f);
    p = p * r + broadcast(4.1665795894e-2f);
    p = p * r + broadcast(1.6666665459e-1f);
    p = p * r + broadcast(5.0000001201e-1f);
    p = p * r * r + r + broadcast(1.0f);
    Whole exponent = ((Whole)shifted) << 23;  // the integer is in the lowest bits
    // NaN is returned separately: shifting its bits would give a finite number.
    return given <= most ? (Vector)((Whole)p + exponent) : given + broadcast(INFINITY);
}

static inline Vector sigmoid(Vector x) { return broadcast(1.0f) / (broadcast(1.0f) + exp_of(-x)); }

// The gradient of silu(g) u with respect to g, where d is that of the product and s = sigmoid(g).
static inline Vector gate_gradient(Vector d, Vector g, Vector u, Vector s) {
    return d * u * s * (broadcast(1.0f) + g * (broadcast(1.0f) - s));
}

// Rotates one head by the angles whose cosines and sines [H / 2] are given (back: inversely), and
// multiplies it by scale; `to` may be `from`. T is float, or Eight if H is a multiple of 16.
template <typename T>
static inline void rotate(const float* from, float* to, const float* cos, const float* sin,
                          int64_t head, float scale, bool back) {
    int64_t half = head / 2;
    float odd = back ? -scale : scale;
    for (int64_t j = 0; j < half; j += sizeof(T) / sizeof(float)) {
        auto at_j = [&](const float* x) {
            T found;
            memcpy(&found, x + j, sizeof(T));
            return found;
        };
        T left = at_j(from), right = at_j(from + half), c = at_j(cos) * scale, s = at_j(sin) * odd;
        T first = left * c - right * s, second = right * c + left * s;
        memcpy(to + j, &first, sizeof(T)), memcpy(to + half + j, &second, sizeof(T));
    }
}

// Scratch memory for n numbers.
struct Memory {
    float* numbers;
    explicit Memory(int64_t n) : numbers((float*)aligned_alloc(64, padded(n) * sizeof(float))) {}
    Memory(const Memory&) = delete;
    ~Memory() { free(numbers); }
    operator float*() const { return numbers; }
};
