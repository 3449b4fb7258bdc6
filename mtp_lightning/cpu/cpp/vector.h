// Vectors of 16 fp32 numbers.
//
// Uses the compiler's vector types, each one AVX-512 register; setup.py sets the instructions that
// the compiler may use.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

constexpr int64_t LANES = 16;

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// n, rounded up to whole vectors.
static inline int64_t padded(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

typedef float Vector __attribute__((vector_size(64)));
typedef float Loose __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t Whole __attribute__((vector_size(64)));

static inline Vector load(const float* from) { return *(const Loose*)from; }
static inline void store(float* to, Vector x) { *(Loose*)to = x; }
static inline Vector all(float x) { return x - (Vector){}; }

// Sixteen int8 numbers as fp32.
static inline Vector load_bytes(const int8_t* from) {
    return (Vector)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from)));
}

// Stores integers between -128 and 127 as int8.
static inline void store_bytes(int8_t* to, Vector x) {
    _mm_storeu_si128((__m128i*)to, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32((__m512)x)));
}

// Rounds to the nearest integer, ties to even.
static inline Vector rounded(Vector x) { return (Vector)_mm512_roundscale_ps((__m512)x, 8); }

// Loads the first n of sixteen numbers; the others become `other`.
static inline Vector load_some(const float* from, int64_t n, float other = 0.0f) {
    return (Vector)_mm512_mask_loadu_ps((__m512)all(other), (1 << n) - 1, from);
}

static inline void store_some(float* to, Vector x, int64_t n) {
    _mm512_mask_storeu_ps(to, (1 << n) - 1, (__m512)x);
}

// Calls body(at, n) for all columns, n <= 16 at a time.
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

// A mask of the lanes `at` .. `at` + 15: all ones for those before `end`.
static inline Whole before(int64_t at, int64_t end) {
    const Whole lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return lanes < (int32_t)(end - at) - (Whole){};
}

static inline bool any(Whole lanes) {
    return _mm512_test_epi32_mask((__m512i)lanes, (__m512i)lanes);
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
    exchange<8>(rows);
    exchange<4>(rows);
    exchange<2>(rows);
    exchange<1>(rows);
}

// a * b + c, rounded once. Used where a sum must have the same bits in loops of any shape: on its own,
// the compiler rounds twice in some of them.
static inline Vector multiply_add(Vector a, Vector b, Vector c) {
    return (Vector)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}

static inline Vector larger(Vector a, Vector b) { return a > b ? a : b; }
static inline Vector size_of(Vector x) { return x < all(0.0f) ? -x : x; }

typedef float Half __attribute__((vector_size(32)));
typedef float Quarter __attribute__((vector_size(16)));

static inline float sum_of(Vector x) {
    Half halves[2];
    Quarter quarters[2];
    memcpy(halves, &x, sizeof(x));
    halves[0] += halves[1];
    memcpy(quarters, halves, sizeof(quarters));
    Quarter four = quarters[0] + quarters[1];
    return (four[0] + four[2]) + (four[1] + four[3]);
}

static inline float largest_of(Vector x) {
    Half halves[2];
    Quarter quarters[2];
    memcpy(halves, &x, sizeof(x));
    halves[0] = halves[0] > halves[1] ? halves[0] : halves[1];
    memcpy(quarters, halves, sizeof(quarters));
    Quarter four = quarters[0] > quarters[1] ? quarters[0] : quarters[1];
    float a = four[0] > four[2] ? four[0] : four[2], b = four[1] > four[3] ? four[1] : four[3];
    return a > b ? a : b;
}

// exp to about one unit in the last place; below -87 it returns about 1e-38, and infinity on overflow.
// NaN stays NaN.
static inline Vector exp_of(Vector given) {
    const Vector most = all(88.72283f);  // the largest x without overflow
    Vector x = given < all(-87.0f) ? all(-87.0f) : given;
    x = x > most ? most : x;
    const Vector magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    Vector shifted = x * all(1.44269504088896341f) + magic;
    Vector n = shifted - magic;
    Vector r = x - n * all(0.693359375f);
    r = r - n * all(-2.12194440e-4f);
    // Polynomial for |r| <= ln(2) / 2 (Cephes' expf).
    Vector p = all(1.9875691500e-4f);
    p = p * r + all(1.3981999507e-3f);
    p = p * r + all(8.3334519073e-3f);
    p = p * r + all(4.1665795894e-2f);
    p = p * r + all(1.6666665459e-1f);
    p = p * r + all(5.0000001201e-1f);
    p = p * r * r + r + all(1.0f);
    Whole exponent = ((Whole)shifted) << 23;  // the integer is in the lowest bits
    // NaN is returned separately: shifting its bits would give a finite number.
    return given <= most ? (Vector)((Whole)p + exponent) : given + all(INFINITY);
}

static inline Vector sigmoid(Vector x) { return all(1.0f) / (all(1.0f) + exp_of(-x)); }

// The gradient of silu(g) u with respect to g, where d is that of the product and s = sigmoid(g).
static inline Vector gate_gradient(Vector d, Vector g, Vector u, Vector s) {
    return d * u * s * (all(1.0f) + g * (all(1.0f) - s));
}

// Rotates one head by the angles whose cosines and sines [H / 2] are given (back: inversely), and
// multiplies it by scale; `to` may be `from`. T is float, or Half if H is a multiple of 16.
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
