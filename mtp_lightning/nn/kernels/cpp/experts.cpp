// Products of tokens with the experts chosen for them, each way in one call.
//
// Rows, one for every choice, are sorted by expert and taken by blocks that stay in the second
// cache from the input to the output. A token's rows are summed in the order of its choices, and a
// weight's gradient in the order of the tokens, so that no sum depends on the number of threads.
//
// Shapes: M tokens, K choices of a token, R = M K rows, E experts, C width, F inner width.
#include <vector>

#include "few.h"

namespace {

struct Shape {
    int64_t tokens, choices, experts, width, inner;
};

// What both ways read.
struct Given {
    const float *x, *gates, *gate_up, *down;  // [M, C], [M, K], [E, 2F, C], [E, C, F]
    const int64_t *starts, *order;            // [E + 1]; [R], the choice that is a row's
};

// Rows of one expert.
struct Rows {
    int64_t expert, first, count;
};

// Columns of one expert's gradient: of d_down, or of d_gate_up.
struct Part {
    int64_t expert, column;
    bool down;
};

}  // namespace

// Of so many rows a panel of a gradient's right side fits into the first cache.
constexpr int64_t MOST = 96;

static std::vector<Rows> blocks_of(const int64_t* starts, int64_t experts) {
    std::vector<Rows> blocks;
    for (int64_t e = 0; e < experts; e++)
        for (int64_t first = starts[e]; first < starts[e + 1]; first += MOST) {
            int64_t left = starts[e + 1] - first;
            blocks.push_back({e, first, left < MOST ? left : MOST});
        }
    return blocks;
}

// Every expert's rows, in the order of the tokens: starts[E + 1] and order[R].
extern "C" void experts_sort(const int64_t* chosen, int64_t* starts, int64_t* order, int64_t rows,
                             int64_t experts) {
    std::vector<int64_t> next(experts + 1, 0);
    for (int64_t i = 0; i < rows; i++) next[chosen[i] + 1]++;
    for (int64_t e = 0; e < experts; e++) next[e + 1] += next[e];
    memcpy(starts, next.data(), (experts + 1) * sizeof(int64_t));
    for (int64_t i = 0; i < rows; i++) order[next[chosen[i]]++] = i;
}

// to[rows, n] = columns from `at` of the tokens' rows.
static void gather(const float* from, const Given& given, const Shape& s, const Rows& b, float* to,
                   int64_t at, int64_t n, int64_t ld) {
    for (int64_t i = 0; i < b.count; i++)
        memcpy(to + i * ld, from + given.order[b.first + i] / s.choices * s.width + at,
               n * sizeof(float));
}

// Rows of a block to the place of their choice.
static void scatter(const float* from, const Given& given, const Shape& s, const Rows& b,
                    float* to) {
    for (int64_t i = 0; i < b.count; i++)
        memcpy(to + given.order[b.first + i] * s.width, from + i * s.width,
               s.width * sizeof(float));
}

// out[M, C] = the sum of every token's rows.
static void add_up(const float* rows, float* out, const Shape& s) {
#pragma omp parallel for schedule(static)
    for (int64_t m = 0; m < s.tokens; m++) {
        const float* from = rows + m * s.choices * s.width;
        columns(s.width, [&](int64_t at, int64_t n) {
            Vector sum = take(from + at, n);
            for (int64_t j = 1; j < s.choices; j++) sum += take(from + j * s.width + at, n);
            put(out + m * s.width + at, sum, n);
        });
    }
}

// a[M, K] times a packed weight for N outputs.
static void product(Left a, const float* packed, float* out, int64_t rows, int64_t outputs,
                    int64_t inputs) {
    for (int64_t at = 0; at < outputs; at += PANEL)
        one_panel(a, rows, inputs, packed + at * inputs, out + at, outputs, outputs - at, false);
}

// weight[N, K] into panels.
static void pack(const float* weight, float* packed, int64_t outputs, int64_t inputs) {
    for (int64_t p = 0; p * PANEL < outputs; p++) pack_panel(weight, packed, outputs, inputs, p);
}

// The same of a weight that lies turned, [K, N].
static void pack_turned(const float* weight, float* packed, int64_t outputs, int64_t inputs) {
    for (int64_t at = 0; at < outputs; at += PANEL) {
        int64_t n = outputs - at < PANEL ? outputs - at : PANEL, wide = panel_width(n, false);
        float* to = packed + at * inputs;
        for (int64_t k = 0; k < inputs; k++) {
            memset(to + k * wide + n, 0, (wide - n) * sizeof(float));
            memcpy(to + k * wide, weight + k * outputs + at, n * sizeof(float));
        }
    }
}

// Every row's result lies in rows_out[R, C] meanwhile.
extern "C" void experts_forward(const Given* from, float* projected, float* rows_out, float* out,
                                const Shape* shape) {
    const Given given = *from;
    const Shape s = *shape;
    int64_t c = s.width, f = s.inner;
    int64_t up_size = packed_numbers(2 * f, c, false), down_size = packed_numbers(c, f, false);
    float* packed = scratch(s.experts * (up_size + down_size));
    std::vector<Rows> blocks = blocks_of(given.starts, s.experts);
#pragma omp parallel
    {
#pragma omp for schedule(dynamic)
        for (int64_t e = 0; e < s.experts; e++) {
            float* to = packed + e * (up_size + down_size);
            pack(given.gate_up + e * 2 * f * c, to, 2 * f, c);
            pack(given.down + e * c * f, to + up_size, c, f);
        }
        float* x = scratch(MOST * c);
        float* inner = scratch(MOST * f);
#pragma omp for schedule(dynamic)
        for (size_t i = 0; i < blocks.size(); i++) {
            Rows b = blocks[i];
            const float* weights = packed + b.expert * (up_size + down_size);
            float* gate_up = projected + b.first * 2 * f;
            gather(given.x, given, s, b, x, 0, c, c);
            product({x, c, 1}, weights, gate_up, b.count, 2 * f, c);
            for (int64_t r = 0; r < b.count; r++) {
                const float *gate = gate_up + r * 2 * f, *up = gate + f;
                Vector share = all(given.gates[given.order[b.first + r]]);
                columns(f, [&](int64_t at, int64_t n) {
                    Vector g = take(gate + at, n);
                    put(inner + r * f + at, g * sigmoid(g) * take(up + at, n) * share, n);
                });
            }
            product({inner, f, 1}, weights + up_size, x, b.count, c, f);
            scatter(x, given, s, b, rows_out);
        }
        free(x), free(inner);
    }
    free(packed);
    add_up(rows_out, out, s);
}

// d_projected[R, 2F] and inner[R, F], the gated inner state, of which the weights' gradients are
// made; the gates' gradients; and every row's part of the input's, rows_out[R, C].
static void rows_backward(const Given& given, const Shape& s, const std::vector<Rows>& blocks,
                          const float* projected, const float* grad, float* d_projected,
                          float* inner, float* d_gates, float* rows_out) {
    int64_t c = s.width, f = s.inner;
    int64_t up_size = packed_numbers(c, 2 * f, false), down_size = packed_numbers(f, c, false);
    float* packed = scratch(s.experts * (up_size + down_size));
#pragma omp parallel
    {
#pragma omp for schedule(dynamic)
        for (int64_t e = 0; e < s.experts; e++) {
            float* to = packed + e * (up_size + down_size);
            pack_turned(given.gate_up + e * 2 * f * c, to, c, 2 * f);
            pack_turned(given.down + e * c * f, to + up_size, f, c);
        }
        float* d_y = scratch(MOST * c);
        float* d_inner = scratch(MOST * f);
#pragma omp for schedule(dynamic)
        for (size_t i = 0; i < blocks.size(); i++) {
            Rows b = blocks[i];
            const float* weights = packed + b.expert * (up_size + down_size);
            gather(grad, given, s, b, d_y, 0, c, c);
            product({d_y, c, 1}, weights + up_size, d_inner, b.count, f, c);
            for (int64_t r = 0; r < b.count; r++) {
                int64_t row = b.first + r, choice = given.order[row];
                const float *gate = projected + row * 2 * f, *up = gate + f;
                float* d_gate = d_projected + row * 2 * f;
                Vector share = all(given.gates[choice]), total = all(0.0f);
                columns(f, [&](int64_t at, int64_t n) {
                    Vector g = take(gate + at, n), u = take(up + at, n);
                    Vector d = take(d_inner + r * f + at, n), sig = sigmoid(g), silu = g * sig;
                    total += d * silu * u;
                    put(inner + row * f + at, silu * u * share, n);
                    d *= share;
                    put(d_gate + f + at, d * silu, n);
                    put(d_gate + at, d * u * sig * (all(1.0f) + g * (all(1.0f) - sig)), n);
                });
                d_gates[choice] = sum_of(total);
            }
            product({d_projected + b.first * 2 * f, 2 * f, 1}, weights, d_y, b.count, c, 2 * f);
            scatter(d_y, given, s, b, rows_out);
        }
        free(d_y), free(d_inner);
    }
    free(packed);
}

static void weights_backward(const Given& given, const Shape& s, const std::vector<Rows>& blocks,
                             const float* grad, const float* d_projected, const float* inner,
                             float* d_gate_up, float* d_down) {
    int64_t c = s.width, f = s.inner;
    std::vector<Part> parts;
    for (int64_t e = 0; e < s.experts; e++) {
        for (int64_t at = 0; at < c; at += PANEL) parts.push_back({e, at, false});
        for (int64_t at = 0; at < f; at += PANEL) parts.push_back({e, at, true});
    }
#pragma omp parallel
    {
        float* left = scratch(MOST * c);
        float* right = scratch(MOST * PANEL);
#pragma omp for schedule(dynamic)
        for (size_t i = 0; i < parts.size(); i++) {
            Part part = parts[i];
            int64_t ld = part.down ? f : c, height = part.down ? c : 2 * f;
            int64_t n = ld - part.column < PANEL ? ld - part.column : PANEL;
            int64_t wide = panel_width(n, false);
            float* to = (part.down ? d_down : d_gate_up) + part.expert * height * ld + part.column;
            bool add = false;
            for (const Rows& b : blocks) {
                if (b.expert != part.expert) continue;
                memset(right, 0, b.count * wide * sizeof(float));
                if (part.down) {
                    gather(grad, given, s, b, left, 0, c, c);
                    for (int64_t r = 0; r < b.count; r++)
                        memcpy(right + r * wide, inner + (b.first + r) * f + part.column,
                               n * sizeof(float));
                    one_panel({left, 1, c}, height, b.count, right, to, ld, n, add);
                } else {
                    gather(given.x, given, s, b, right, part.column, n, wide);
                    one_panel({d_projected + b.first * 2 * f, 1, 2 * f}, height, b.count, right, to, ld,
                              n, add);
                }
                add = true;
            }
            if (!add)  // an expert without tokens has a gradient, too
                for (int64_t r = 0; r < height; r++) memset(to + r * ld, 0, n * sizeof(float));
        }
        free(left), free(right);
    }
}

// Every row's part of d_x lies in rows_out[R, C] meanwhile.
extern "C" void experts_backward(const Given* from, const float* projected, const float* grad,
                                 float* d_projected, float* inner, float* rows_out, float* d_x,
                                 float* d_gates, float* d_gate_up, float* d_down,
                                 const Shape* shape) {
    const Given given = *from;
    const Shape s = *shape;
    std::vector<Rows> blocks = blocks_of(given.starts, s.experts);
    rows_backward(given, s, blocks, projected, grad, d_projected, inner, d_gates, rows_out);
    add_up(rows_out, d_x, s);
    if (d_down) weights_backward(given, s, blocks, grad, d_projected, inner, d_gate_up, d_down);
}
