// Integer products: x[M, K] weight.T of a weight in blocks, with the inputs of a block rounded to int8.
//
// A block's sum is one of integers, exact in any order: weight = step x q + offset and x ~ s x i with i
// of 8 bits give s x step x sum(q i) + s x offset x sum(i). llama.cpp multiplies quantized weights so,
// too. Blocks are added in the order of the inputs, so a row's bits depend on no other row.
//
// Shapes: as in formats.h; G groups of inputs.
#pragma once

#include <vector>

#include "formats.h"

// Rows in int8, in tiles of up to TALL rows: for every group, the scales s of a tile's rows, their
// s x sum(i), and their numbers i, four to a word, in the order in which a format's lanes are multiplied.
struct Rounded {
    std::vector<float> scale, total;  // [tile, G, rows of a tile]
    std::vector<int32_t> words;       // [tile, G, GROUP / 4, rows of a tile]
};

// Rows of a tile. A tile has whole panels, so that memory is read in order (in halves of panels, three
// tokens took twice as long as two on Zen 4); with many rows NARROW vectors, whose sums stay in the
// registers.
constexpr int64_t TALL = 4;
constexpr int64_t MANY = 32;
constexpr int NARROW = 2;

// The bytes of eight inputs in the order in which a format multiplies them: the lanes of 4 bits have
// the even inputs of a word in their lower halves, and the odd ones in their upper halves.
template <typename Format>
static inline __m128i in_order(__m128i bytes) {
    if constexpr (Format::BITS == 8) return bytes;
    return _mm_shuffle_epi8(
        bytes, _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15));
}

// Rounds a group's numbers to bytes; returns the scale.
template <typename Format>
static float round_group(const float* x, int8_t* bytes, float* total) {
    Vector top = broadcast(0.0f), wrong = broadcast(0.0f);
    for (int64_t k = 0; k < Format::GROUP; k += LANES) {
        Vector v = load(x + k);
        top = larger(top, absolute(v));
        wrong += v * broadcast(0.0f);  // NaN, if a number is none or infinite
    }
    float size = max_lane(top), inverse = size > 0 ? 127.0f / size : 0.0f;
    float scale = size / 127.0f + sum_lanes(wrong);
    Whole sum = {};
    for (int64_t k = 0; k < Format::GROUP; k += 16, bytes += 16) {
        for (int64_t j = 0; j < 16; j += LANES) {
            Whole i = integers(load(x + k + j) * broadcast(inverse));
            sum += i;
            store_bytes(bytes + j, i);
        }
        __m128i i = _mm_loadu_si128((const __m128i*)bytes);
        _mm_storeu_si128((__m128i*)bytes, in_order<Format>(i));
    }
    // Exact, as sums of a few thousand are.
    *total = scale * sum_lanes(numbers(sum));
    return scale;
}

template <typename Format>
static void round_rows(const float* x, int64_t rows, int64_t inputs, Rounded& to) {
    constexpr int64_t GROUP = Format::GROUP, WORDS = GROUP / 4;
    int64_t groups = inputs / GROUP, n = rows * groups;
    to.scale.resize(n), to.total.resize(n), to.words.resize(n * WORDS);
    for (int64_t row = 0; row < rows; row++) {
        int64_t r = row % TALL, high = least(TALL, rows - (row - r));
        for (int64_t g = 0; g < groups; g++, x += GROUP) {
            int64_t at = (row - r) * groups + g * high;
            int32_t words[WORDS];
            to.scale[at + r] = round_group<Format>(x, (int8_t*)words, &to.total[at + r]);
            for (int64_t w = 0; w < WORDS; w++) to.words[at * WORDS + w * high + r] = words[w];
        }
    }
}

// out[R][V] of a tile of R rows, whose groups begin at `at`, and of V vectors of outputs from vector
// `first` on, of a panel of `width`.
template <typename Format, int R, int V>
MULTIPLIES_BYTES static void integer_tile(const char* panel, int64_t width, int64_t first,
                                          const Rounded& x, int64_t at, int64_t groups, float* out) {
    constexpr int64_t WORDS = Format::GROUP / 4;
    constexpr int SIZE = Format::SCALES::SIZE;
    using Sum = Dot<Format::BITS>;
    Vector sum[R][V];
    each_vector<R, V>(BODY(int r, int v) { sum[r][v] = broadcast(0.0f); });
    if (V == WIDE_VECTORS) width = V;  // a number that the compiler knows
    const int32_t* words = x.words.data() + at * WORDS;
    const float *scale = x.scale.data() + at, *total = x.total.data() + at;
    const char *scales = panel + first * SIZE * sizeof(Vector),
               *numbers = panel + (width * SIZE + first) * sizeof(Vector);
    for (int64_t g = 0; g < groups; g++, words += WORDS * R, scale += R, total += R) {
#pragma GCC unroll 4
        for (int i = 0; i < V * SIZE; i++) prefetch(scales + i * sizeof(Vector));
        Sum dot[R][V];
        // Loops: with `times`, two rows take 1.1 times as long on Zen 3.
#pragma GCC unroll 8
        for (int i = 0; i < Format::VECTORS; i++) {
#pragma GCC unroll 4
            for (int v = 0; v < V; v++) {
                const char* from = numbers + (i * width + v) * sizeof(Vector);
                prefetch(from);
                Whole levels = load_whole(from);
#pragma GCC unroll 2
                for (int p = 0; p < Sum::PARTS; p++) {
                    auto part = Sum::part(levels, p);
#pragma GCC unroll 4
                    for (int r = 0; r < R; r++)
                        dot[r][v].add(part, words[(i * Sum::PARTS + p) * R + r]);
                }
            }
        }
#pragma GCC unroll 4
        for (int r = 0; r < R; r++)
#pragma GCC unroll 4
            for (int v = 0; v < V; v++) {
                const char* of = scales + v * SIZE * sizeof(Vector);
                Vector scaled = broadcast(scale[r]) * dot[r][v].total();
                sum[r][v] = multiply_add(Format::SCALES::step(of), scaled, sum[r][v]);
                sum[r][v] = multiply_add(Format::SCALES::offset(of), broadcast(total[r]), sum[r][v]);
            }
        int64_t block = width * (SIZE + Format::VECTORS) * sizeof(Vector);
        scales += block, numbers += block;
    }
    each_vector<R, V>(BODY(int r, int v) { store(out + (r * V + v) * LANES, sum[r][v]); });
}

// out[M, N] (+)= x[M, K] weight.T of a weight in blocks.
template <typename Format>
static void integer_product(const float* x, const char* weight, float* out, int64_t rows,
                            int64_t outputs, int64_t inputs, bool add) {
    static thread_local Rounded kept;
    Rounded& rounded = kept;  // other threads have their own `kept`
    round_rows<Format>(x, rows, inputs, rounded);
    int64_t panels = (outputs + PANEL - 1) / PANEL, size = Format::bytes(PANEL, inputs);
    int64_t groups = inputs / Format::GROUP;
#pragma omp parallel for schedule(static) if (rows * outputs * inputs > WORTH_THREADS)
    for (int64_t p = 0; p < panels; p++) {
        int64_t at = p * PANEL, width = panel_width<Format>(outputs - at) / LANES;
        int64_t widest = rows <= MANY ? width : NARROW;
        for (int64_t i = 0; i < rows; i += TALL)
            for (int64_t first = 0; first < width; first += widest)
                sized<TALL>(rows - i, least(widest, width - first) * LANES, [&](auto r, auto v) {
                    constexpr int R = r.value, V = v.value;
                    float found[R * V * LANES];
                    integer_tile<Format, R, V>(weight + p * size, width, first, rounded, i * groups,
                                               groups, found);
                    for (int j = 0; j < R; j++)
                        for (int u = 0; u < V; u++) {
                            int64_t o = at + (first + u) * LANES;
                            store_sum(out + (i + j) * outputs + o, load(found + (j * V + u) * LANES),
                                      outputs - o, add);
                        }
                });
    }
}
