// Operations that the compiler's vector types lack, for AVX2.
#pragma once

// The nearest integers, ties to even.
static inline Whole integers(Vector x) { return (Whole)_mm256_cvtps_epi32((__m256)x); }
static inline Vector numbers(Whole x) { return (Vector)_mm256_cvtepi32_ps((__m256i)x); }

// int8 numbers as fp32.
static inline Vector load_bytes(const int8_t* from) {
    return numbers((Whole)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)from)));
}

// fp16 numbers as fp32.
static inline Vector load_fp16(const char* from) {
    return (Vector)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from));
}
static inline void store_fp16(char* to, Vector x) {
    _mm_storeu_si128((__m128i*)to, _mm256_cvtps_ph((__m256)x, 0));
}

// Stores the low bytes of integers.
static inline void store_bytes(int8_t* to, Whole x) {
#pragma GCC unroll 8
    for (int i = 0; i < LANES; i++) to[i] = (int8_t)x[i];
}

// Rounds to the nearest integer, ties to even.
static inline Vector rounded(Vector x) { return (Vector)_mm256_round_ps((__m256)x, 8); }

// Loads the first n numbers; the others become `other`.
static inline Vector load_some(const float* from, int64_t n, float other = 0.0f) {
    __m256i mask = (__m256i)lanes_before(0, n);
    return (Vector)_mm256_blendv_ps((__m256)broadcast(other), _mm256_maskload_ps(from, mask),
                                    (__m256)mask);
}

static inline void store_some(float* to, Vector x, int64_t n) {
    _mm256_maskstore_ps(to, (__m256i)lanes_before(0, n), (__m256)x);
}

static inline bool any(Whole lanes) { return !_mm256_testz_si256((__m256i)lanes, (__m256i)lanes); }

static inline Vector multiply_add(Vector a, Vector b, Vector c) {
    return (Vector)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}

// (a & b) | c
static inline Whole masked_or(Whole a, int32_t b, int32_t c) { return (a & b) | c; }

// Functions that multiply bytes have this attribute.
#define MULTIPLIES_BYTES

// Whether this CPU multiplies bytes.
static inline bool has_byte_products() { return true; }

// The sums over a block of products of levels of BITS bits with int8 numbers, one sum a lane. Levels of
// 8 bits are multiplied in halves of 4 bits: a pair of such products has at most 2 x 15 x 127, and the
// eight pairs of a block fit into 16 bits.
template <int BITS>
struct Dot {
    static constexpr int PARTS = 8 / BITS, HALVES = BITS / 4;
    __m256i pairs[HALVES] = {};

    // The parts of a vector of levels, each with one level a byte.
    static __m256i part(Whole levels, int p) {
        return PARTS == 1 ? (__m256i)levels : half((__m256i)levels, p);
    }
    // Adds a part times the four bytes of a word.
    void add(__m256i part, int32_t word) {
        __m256i bytes = _mm256_set1_epi32(word);
#pragma GCC unroll 2
        for (int i = 0; i < HALVES; i++) {
            __m256i levels = HALVES == 1 ? part : half(part, i);
            pairs[i] = _mm256_add_epi16(pairs[i], _mm256_maddubs_epi16(levels, bytes));
            // Added now: the compiler would keep all products, which do not fit into the registers.
            __asm__("" : "+x"(pairs[i]));
        }
    }
    Vector total() const {
        const __m256i one = _mm256_set1_epi16(1);
        __m256i sum = _mm256_madd_epi16(pairs[0], one);
        if constexpr (HALVES == 2)
            sum = _mm256_add_epi32(sum, _mm256_slli_epi32(_mm256_madd_epi16(pairs[1], one), 4));
        return numbers((Whole)sum);
    }

   private:
    // The lower or upper four bits of every byte.
    static __m256i half(__m256i bytes, int upper) {
        return _mm256_and_si256(_mm256_srli_epi32(bytes, 4 * upper), _mm256_set1_epi8(15));
    }
};
