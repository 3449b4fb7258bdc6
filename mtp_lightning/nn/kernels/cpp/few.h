// Products with few rows on the left: a read of the weights, at the memory's rate.
//
// Weights are packed by panels of 64 outputs: for every input the 64 numbers side by side, so that a
// panel is one stream and no sum runs across lanes. In bf16 a vector holds 32 of them: outputs i in
// the lower halves, i + 16 in the upper ones. Every output is one chain of multiply-adds in the
// order of its inputs, whatever other rows are computed with it: the same bits in a pass of one row
// and of many.
//
// Shapes: M rows, N outputs, K inputs.
#pragma once

#include "vector.h"

constexpr int64_t PANEL = 4 * LANES;

// Numbers of a packed weight; a panel is as wide as its outputs, by vectors (in bf16 pairs of them).
static inline int64_t panel_width(int64_t outputs, bool half) {
    int64_t unit = half ? 2 * LANES : LANES;
    int64_t width = (outputs + unit - 1) / unit * unit;
    return width < PANEL ? width : PANEL;
}

static inline Vector lower_half(Whole x) { return (Vector)(x << 16); }
static inline Vector upper_half(Whole x) { return (Vector)(x & (int32_t)0xffff0000); }

typedef int32_t LooseWhole __attribute__((vector_size(64), aligned(4), may_alias));

// R rows times a panel of V vectors: out[R, 16 V] (+)= x[R, K] panel[K, 16 V].
template <int R, int V, typename Number>
static inline void panel_rows(const float* x, int64_t inputs, const Number* panel, float* out,
                              int64_t outputs, int64_t n, bool add) {
    Vector sum[R][V];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) sum[r][v] = all(0.0f);
    for (int64_t k = 0; k < inputs; k++, panel += V * LANES) {
        Vector weight[V];
        if constexpr (sizeof(Number) == 2) {
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
            int64_t left = n - v * LANES;
            float* to = out + r * outputs + v * LANES;
            if (left >= LANES)
                store(to, add ? load(to) + sum[r][v] : sum[r][v]);
            else if (left > 0)
                store_some(to, add ? load_some(to, left) + sum[r][v] : sum[r][v], left);
        }
}

constexpr int64_t ROWS_AT_ONCE = 6;  // 6 x 4 sums and 4 weights: what the registers hold

template <int V, typename Number>
static void panel_product(const float* x, int64_t rows, int64_t inputs, const Number* panel,
                          float* out, int64_t outputs, int64_t n, bool add) {
    while (rows > 0) {
        int64_t r = rows < ROWS_AT_ONCE ? rows : ROWS_AT_ONCE;
        switch (r) {
            case 1: panel_rows<1, V>(x, inputs, panel, out, outputs, n, add); break;
            case 2: panel_rows<2, V>(x, inputs, panel, out, outputs, n, add); break;
            case 3: panel_rows<3, V>(x, inputs, panel, out, outputs, n, add); break;
            case 4: panel_rows<4, V>(x, inputs, panel, out, outputs, n, add); break;
            case 5: panel_rows<5, V>(x, inputs, panel, out, outputs, n, add); break;
            default: panel_rows<6, V>(x, inputs, panel, out, outputs, n, add);
        }
        rows -= r, x += r * inputs, out += r * outputs;
    }
}

// Below so many multiply-adds starting a thread costs more than it brings.
constexpr int64_t WORTH_THREADS = 1 << 18;

// out[M, N] (+)= x[M, K] weight.T, of a packed weight.
template <typename Number>
static void few_rows(const float* x, const Number* weight, float* out, int64_t rows, int64_t outputs,
                     int64_t inputs, bool add) {
    int64_t panels = (outputs + PANEL - 1) / PANEL;
#pragma omp parallel for schedule(static) if (rows * outputs * inputs > WORTH_THREADS)
    for (int64_t p = 0; p < panels; p++) {
        const Number* panel = weight + p * PANEL * inputs;
        int64_t n = outputs - p * PANEL;
        float* to = out + p * PANEL;
        switch (panel_width(n, sizeof(Number) == 2) / LANES) {
            case 1:
                if constexpr (sizeof(Number) == 4)
                    panel_product<1>(x, rows, inputs, panel, to, outputs, n, add);
                break;
            case 2: panel_product<2>(x, rows, inputs, panel, to, outputs, n, add); break;
            case 3:
                if constexpr (sizeof(Number) == 4)
                    panel_product<3>(x, rows, inputs, panel, to, outputs, n, add);
                break;
            default: panel_product<4>(x, rows, inputs, panel, to, outputs, n, add);
        }
    }
}

static inline void few_rows(const float* x, const void* weight, bool half, float* out, int64_t rows,
                            int64_t outputs, int64_t inputs, bool add) {
    if (half)
        few_rows(x, (const uint16_t*)weight, out, rows, outputs, inputs, add);
    else
        few_rows(x, (const float*)weight, out, rows, outputs, inputs, add);
}
