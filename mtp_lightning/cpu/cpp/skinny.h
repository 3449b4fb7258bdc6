// Skinny GEMM: products of few rows with a packed weight.
//
// Every output is one chain of multiply-adds in the order of its inputs, independent of other rows: one
// row has the same bits as many, and every format has the bits of fp32, except int8, whose scale
// multiplies the sum.
//
// Shapes: as in formats.h.
#pragma once

#include <vector>

#include "integer.h"

// R rows of x[M, K] times P adjacent panels of V vectors in all, into (or added to) `left` outputs of R rows
// of out[M, N].
template <typename Format, int R, int V, int P = 1>
static void rows_of_panels(const float* x, int64_t inputs, const char* panel, float* out,
                           int64_t outputs, int64_t left, bool add) {
    int64_t size = Format::bytes(PANEL, inputs);
    Vector sum[R][V];
    each_vector<R, V>(BODY(int r, int v) { sum[r][v] = broadcast(0.0f); });
    auto product = BODY(int64_t k, auto& weight) {
        add_products<R, V>(BODY(int r) { return x[r * inputs + k]; }, weight, sum);
    };
    if constexpr (std::is_same_v<Format, Full>) {  // prefetching pays only on some CPUs
        if (PREFETCH_BYTES)
            Full::each<V, P, true>(panel, inputs, product);
        else
            Full::each<V, P>(panel, inputs, product);
    } else {
        Format::template each<V, P>(panel, inputs, product);
    }
    each_vector<R, V>(BODY(int r, int v) {
        if constexpr (Format::SCALED)
            sum[r][v] *= Format::scale(panel + v / (V / P) * size, v % (V / P));
        store_sum(out + r * outputs + v * LANES, sum[r][v], left - v * LANES, add);
    });
}

// From this many rows on, numbers are unpacked to fp32 once for all rows, so many inputs at a time that
// they stay in the first cache (as do the sums of up to about a hundred rows).
constexpr int64_t WORTH_UNPACKING = 2 * HIGH, UNPACKED = 64;

// All M rows times a panel of V vectors, into (or added to) `left` outputs of out[M, N].
template <typename Format, int V>
static void many_rows(const float* x, int64_t rows, int64_t inputs, const char* panel, float* out,
                      int64_t outputs, int64_t left, bool add) {
    alignas(64) float unpacked[UNPACKED * V * LANES];
    static thread_local std::vector<float> kept;
    if ((int64_t)kept.size() < rows * V * LANES) kept.resize(rows * V * LANES);
    float* sums = kept.data();
    // Adds the products of n inputs from k on.
    auto multiply = [&](int64_t k, int64_t n) __attribute__((noinline)) {
        for (int64_t i = 0; i < rows; i += HIGH)
            sized<HIGH, V>(rows - i, V * LANES, [&](auto r, auto v) {
                if constexpr (v.value == V)
                    tile<r.value, V>(
                        n, BODY(int j, int64_t at) { return x[(i + j) * inputs + k + at]; },
                        BODY(int64_t at) { return unpacked + at * V * LANES; },
                        BODY(int j) { return sums + (i + j) * V * LANES; }, k > 0);
            });
    };
    Format::template each<V>(panel, inputs, BODY(int64_t k, auto& weight) {
        int64_t at = k % UNPACKED;
        times<V>(BODY(int v) { store(unpacked + (at * V + v) * LANES, weight[v]); });
        if (at + 1 == UNPACKED || k + 1 == inputs) multiply(k - at, at + 1);
    });
    for (int64_t i = 0; i < rows; i++)
        times<V>(BODY(int v) {
            Vector sum = load(sums + (i * V + v) * LANES);
            if constexpr (Format::SCALED) sum *= Format::scale(panel, v);
            store_sum(out + i * outputs + v * LANES, sum, left - v * LANES, add);
        });
}

// out[M, N] (+)= x[M, K] weight.T of a packed weight.
template <typename Format>
static void skinny(const float* x, const char* weight, float* out, int64_t rows, int64_t outputs,
                   int64_t inputs, bool add) {
    // With 16 registers, the sums of more rows leave none for the scales of blocks.
    constexpr int64_t ROWS = REGISTERS == 16 && Format::IN_BLOCKS ? 4 : HIGH;
    int64_t panels = (outputs + PANEL - 1) / PANEL, size = Format::bytes(PANEL, inputs);
    // The sums of one row and one panel are too few chains to hide the latency of multiply-adds and of memory.
    // Unpacking blocks takes longer than both.
    int64_t pairs = !Format::IN_BLOCKS && rows == 1 ? outputs / (2 * PANEL) : 0;
#pragma omp parallel for schedule(static) if (rows * outputs * inputs > WORTH_THREADS)
    for (int64_t j = 0; j < panels - pairs; j++) {
        int64_t p = j < pairs ? 2 * j : j + pairs;
        int64_t at = p * PANEL, left = outputs - at, width = panel_width<Format>(left);
        const char* panel = weight + p * size;
        if constexpr (!Format::IN_BLOCKS)
            if (j < pairs) {
                rows_of_panels<Format, 1, 2 * WIDE_VECTORS, 2>(x, inputs, panel, out + at, outputs,
                                                               left, add);
                continue;
            }
        if constexpr (Format::SCALED || Format::IN_BLOCKS)  // not bf16 and fp16, which one instruction unpacks
            if (rows >= WORTH_UNPACKING) {
                sized<1>(1, width, [&](auto, auto v) {
                    many_rows<Format, v.value>(x, rows, inputs, panel, out + at, outputs, left, add);
                });
                continue;
            }
        // Blocks take the compiler long: the outputs after the last whole panel are computed row by row.
        int64_t high = Format::IN_BLOCKS && width < PANEL ? 1 : ROWS;
        for (int64_t i = 0; i < rows; i += high)
            sized<ROWS>(least(high, rows - i), width, [&](auto r, auto v) {
                constexpr bool WHOLE = v.value == WIDE_VECTORS;
                if constexpr (Format::IN_BLOCKS ? r.value == 1 || WHOLE : v.value % Format::UNIT == 0)
                    rows_of_panels<Format, r.value, v.value>(
                        x + i * inputs, inputs, panel, out + i * outputs + at, outputs, left, add);
            });
    }
}

// The same of a weight in any format, also by sums of integers.
static void skinny(const float* x, const Packed& weight, float* out, int64_t rows, int64_t outputs,
                   int64_t inputs, bool add) {
    as_format(weight.kind, [&](auto format) {
        using Format = decltype(format);
        const char* data = (const char*)weight.data;
        if constexpr (Format::IN_BLOCKS)
            if (weight.kind & INTEGER)
                return integer_product<Format>(x, data, out, rows, outputs, inputs, add);
        skinny<Format>(x, data, out, rows, outputs, inputs, add);
    });
}
