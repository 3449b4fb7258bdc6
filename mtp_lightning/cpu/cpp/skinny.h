// Skinny GEMM: products with few rows on the left, limited by reading the weights from memory.
//
// Weights are packed in panels of 64 outputs: the 64 numbers of every input are adjacent, so that a
// panel is one stream and no sum runs across lanes. In bf16 a vector holds 32 of them: output i in
// the lower half and output i + 16 in the upper half of a lane. In int8 (weight = number x scale of
// its output) the scales of all outputs come first. Every output is one chain of multiply-adds in
// the order of its inputs, independent of other rows: one row has the same bits as many.
//
// Shapes: M rows, N outputs, K inputs.
#pragma once

#include "vector.h"

constexpr int64_t PANEL = WIDE;

// The dtype of the numbers of a packed weight: fp32, bf16, int8.
enum Kind : int64_t { FULL, HALF, BYTE };

// The width of a panel: its outputs, rounded up to whole vectors (in bf16 to pairs of them).
static inline int64_t panel_width(int64_t outputs, int64_t kind) {
    int64_t unit = kind == HALF ? 2 * LANES : LANES;
    int64_t width = (outputs + unit - 1) / unit * unit;
    return width < PANEL ? width : PANEL;
}

static inline Vector lower_half(Whole x) { return (Vector)(x << 16); }
static inline Vector upper_half(Whole x) { return (Vector)(x & (int32_t)0xffff0000); }

typedef int32_t LooseWhole __attribute__((vector_size(64), aligned(4), may_alias));

template <typename Number>
constexpr int64_t KIND = sizeof(Number) == 4 ? FULL : sizeof(Number) == 2 ? HALF : BYTE;

// R rows times a panel of V vectors: out[R, 16 V] (+)= x[R, K] panel[K, 16 V]; `scales` are int8's.
template <int R, int V, typename Number>
static inline void panel_rows(const float* x, int64_t inputs, const Number* panel,
                              const float* scales, float* out, int64_t outputs, int64_t n,
                              bool add) {
    Vector sum[R][V];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) sum[r][v] = all(0.0f);
    for (int64_t k = 0; k < inputs; k++, panel += V * LANES) {
        Vector weight[V];
        if constexpr (KIND<Number> == BYTE) {
#pragma GCC unroll 4
            for (int v = 0; v < V; v++) weight[v] = load_bytes(panel + v * LANES);
        } else if constexpr (KIND<Number> == HALF) {
#pragma GCC unroll 2
            for (int v = 0; v < V; v += 2) {
                Whole pair = *(const LooseWhole*)(panel + v * LANES);
                weight[v] = lower_half(pair), weight[v + 1] = upper_half(pair);
            }
        } else {
#pragma GCC unroll 4
            for (int v = 0; v < V; v++) weight[v] = load(panel + v * LANES);
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            Vector left = all(x[r * inputs + k]);
#pragma GCC unroll 4
            for (int v = 0; v < V; v++) sum[r][v] = multiply_add(left, weight[v], sum[r][v]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) {
            if constexpr (KIND<Number> == BYTE) sum[r][v] *= load(scales + v * LANES);
            int64_t left = n - v * LANES;
            float* to = out + r * outputs + v * LANES;
            if (left >= LANES)
                store(to, add ? load(to) + sum[r][v] : sum[r][v]);
            else if (left > 0)
                store_some(to, add ? load_some(to, left) + sum[r][v] : sum[r][v], left);
        }
}

// With fewer multiply-adds, starting a thread costs more than it saves.
constexpr int64_t WORTH_THREADS = 1 << 18;

// out[M, N] (+)= x[M, K] weight.T of a packed weight.
template <typename Number>
static void skinny(const float* x, const Number* weight, const float* scales, float* out,
                   int64_t rows, int64_t outputs, int64_t inputs, bool add) {
    int64_t panels = (outputs + PANEL - 1) / PANEL;
#pragma omp parallel for schedule(static) if (rows * outputs * inputs > WORTH_THREADS)
    for (int64_t p = 0; p < panels; p++) {
        int64_t at = p * PANEL, n = outputs - at, width = panel_width(n, KIND<Number>);
        for (int64_t i = 0; i < rows; i += HIGH)
            sized(rows - i, width, [&](auto r, auto v) {
                if constexpr (KIND<Number> != HALF || v.value % 2 == 0)
                    panel_rows<r.value, v.value>(x + i * inputs, inputs, weight + at * inputs,
                                                 scales + at, out + i * outputs + at, outputs, n,
                                                 add);
            });
    }
}

static inline void skinny(const float* x, const void* weight, int64_t kind, float* out,
                          int64_t rows, int64_t outputs, int64_t inputs, bool add) {
    const float* scales = (const float*)weight;
    if (kind == BYTE)
        skinny(x, (const int8_t*)(scales + padded(outputs)), scales, out, rows, outputs, inputs, add);
    else if (kind == HALF)
        skinny(x, (const uint16_t*)weight, scales, out, rows, outputs, inputs, add);
    else
        skinny(x, (const float*)weight, scales, out, rows, outputs, inputs, add);
}
