// Operations that the compiler's vector types lack, for AVX-512.
#pragma once

// The nearest integers, ties to even.
static inline Whole integers(Vector x) { return (Whole)_mm512_cvtps_epi32((__m512)x); }
static inline Vector numbers(Whole x) { return (Vector)_mm512_cvtepi32_ps((__m512i)x); }

// int8 numbers as fp32.
static inline Vector load_bytes(const int8_t* from) {
    return numbers((Whole)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from)));
}

// fp16 numbers as fp32.
static inline Vector load_fp16(const char* from) {
    return (Vector)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from));
}
static inline void store_fp16(char* to, Vector x) {
    _mm256_storeu_si256((__m256i*)to, _mm512_cvtps_ph((__m512)x, 0));
}

// Stores the low bytes of integers.
static inline void store_bytes(int8_t* to, Whole x) {
    _mm_storeu_si128((__m128i*)to, _mm512_cvtepi32_epi8((__m512i)x));
}

// Rounds to the nearest integer, ties to even.
static inline Vector rounded(Vector x) { return (Vector)_mm512_roundscale_ps((__m512)x, 8); }

// Loads the first n numbers; the others become `other`.
static inline Vector load_some(const float* from, int64_t n, float other = 0.0f) {
    return (Vector)_mm512_mask_loadu_ps((__m512)broadcast(other), (1 << n) - 1, from);
}

static inline void store_some(float* to, Vector x, int64_t n) {
    _mm512_mask_storeu_ps(to, (1 << n) - 1, (__m512)x);
}

static inline bool any(Whole lanes) {
    return _mm512_test_epi32_mask((__m512i)lanes, (__m512i)lanes);
}

static inline Vector multiply_add(Vector a, Vector b, Vector c) {
    return (Vector)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}

// (a & b) | c
static inline Whole masked_or(Whole a, int32_t b, int32_t c) {
    return (Whole)_mm512_ternarylogic_epi32((__m512i)a, _mm512_set1_epi32(b), _mm512_set1_epi32(c),
                                            0xea);
}

// Functions that multiply bytes have this attribute.
#define MULTIPLIES_BYTES __attribute__((target("avx512vnni")))

// Whether this CPU multiplies bytes.
static inline bool has_byte_products() { return __builtin_cpu_supports("avx512vnni") != 0; }

// The sums over a block of products of levels of BITS bits with int8 numbers, one sum a lane.
template <int BITS>
struct Dot {
    static constexpr int PARTS = 8 / BITS;
    __m512i sum = _mm512_setzero_si512();

    // The parts of a vector of levels, each with one level a byte.
    static __m512i part(Whole levels, int p) {
        if (PARTS == 1) return (__m512i)levels;
        return _mm512_and_si512(_mm512_srli_epi32((__m512i)levels, 4 * p), _mm512_set1_epi8(15));
    }
    // Adds a part times the four bytes of a word.
    MULTIPLIES_BYTES inline __attribute__((always_inline)) void add(__m512i part, int32_t word) {
        sum = _mm512_dpbusd_epi32(sum, part, _mm512_set1_epi32(word));
    }
    Vector total() const { return numbers((Whole)sum); }
};
