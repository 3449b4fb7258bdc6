// SwiGLU layers, forward and backward in one call each: experts on the tokens that chose them, or a
// dense layer, which is a single expert of all tokens.
//
// Rows, one for every choice, are sorted by expert and processed in blocks that stay in the L2
// cache from the input to the output. A token's rows are summed in the order of its choices, and a
// weight's gradient in the order of the tokens, so that no sum depends on the number of threads.
//
// Shapes: M tokens, K choices of a token, R = M K rows, E experts, C width, F inner width, both
// multiples of 16.
#include <vector>

#include "rows.h"

namespace {

struct Shape {
    int64_t tokens, choices, experts, width, inner;
};

// The inputs of both passes.
struct Given {
    const float *x, *gates, *gate_up, *down;  // [M, C], [M, K], [E, 2F, C], [E, C, F]
    const int64_t *starts, *order;            // [E + 1]; [R], the choice of every row
};

// Rows of a block: 64 of their columns fit into the L1 cache.
constexpr int64_t MOST = 96;

// Rows of one expert.
struct Rows {
    int64_t expert, first, count;
};

// A tile of one expert's gradient, d_down or d_gate_up.
struct Part {
    int64_t expert, row, column;
    bool down;
};

// Rows of such a tile: few enough that a dense layer also has work for several threads.
constexpr int64_t BAND = 32 * HIGH;

// Pointers to the rows of a block.
struct Places {
    float* row[MOST];

    // Consecutive rows.
    Places(float* from, int64_t n, int64_t step) {
        for (int64_t i = 0; i < n; i++) row[i] = from + i * step;
    }

    // Every row at its choice; with `choices` per token, at its token.
    Places(float* from, const int64_t* order, int64_t n, int64_t step, int64_t choices = 1) {
        for (int64_t i = 0; i < n; i++) row[i] = from + order[i] / choices * step;
    }
};

}  // namespace

static std::vector<Rows> blocks_of(const int64_t* starts, int64_t experts) {
    std::vector<Rows> blocks;
    for (int64_t e = 0; e < experts; e++)
        for (int64_t first = starts[e]; first < starts[e + 1]; first += MOST)
            blocks.push_back({e, first, least(MOST, starts[e + 1] - first)});
    return blocks;
}

// Sorts the rows by expert, in the order of the tokens: starts[E + 1] and order[R].
extern "C" void experts_sort(const int64_t* chosen, int64_t* starts, int64_t* order, int64_t rows,
                             int64_t experts) {
    std::vector<int64_t> next(experts + 1, 0);
    for (int64_t i = 0; i < rows; i++) next[chosen[i] + 1]++;
    for (int64_t e = 0; e < experts; e++) next[e + 1] += next[e];
    memcpy(starts, next.data(), (experts + 1) * sizeof(int64_t));
    for (int64_t i = 0; i < rows; i++) order[next[chosen[i]]++] = i;
}

// out[M, C] = sum of every token's rows.
static void add_up(const float* rows, float* out, const Shape& s) {
#pragma omp parallel for schedule(static)
    for (int64_t m = 0; m < s.tokens; m++) {
        const float* from = rows + m * s.choices * s.width;
        for (int64_t at = 0; at < s.width; at += LANES) {
            Vector sum = load(from + at);
            for (int64_t j = 1; j < s.choices; j++) sum += load(from + j * s.width + at);
            store(out + m * s.width + at, sum);
        }
    }
}

// rows_out[R, C] holds every row's result; with one choice per token, it is `out` itself.
extern "C" void experts_forward(const Given* from, float* projected, float* rows_out, float* out,
                                const Shape* shape) {
    const Given given = *from;
    const Shape s = *shape;
    int64_t c = s.width, f = s.inner, size = 3 * f * c;
    Memory packed(s.experts * size);
    std::vector<Rows> blocks = blocks_of(given.starts, s.experts);
#pragma omp parallel
    {
#pragma omp for schedule(dynamic)
        for (int64_t e = 0; e < s.experts; e++) {
            pack_panels(given.gate_up + e * 2 * f * c, packed + e * size, 2 * f, c);
            pack_panels(given.down + e * c * f, packed + e * size + 2 * f * c, c, f);
        }
        Memory inner(MOST * f);
        Places inners(inner, MOST, f);
#pragma omp for schedule(dynamic)
        for (size_t i = 0; i < blocks.size(); i++) {
            Rows b = blocks[i];
            const float* weights = packed + b.expert * size;
            const int64_t* order = given.order + b.first;
            Places x((float*)given.x, order, b.count, c, s.choices);
            Places gate_up(projected + b.first * 2 * f, b.count, 2 * f);
            Places y(rows_out, order, b.count, c);
            product_of_rows(x.row, weights, gate_up.row, b.count, 2 * f, c);
            for (int64_t r = 0; r < b.count; r++) {
                const float *gate = gate_up.row[r], *up = gate + f;
                Vector share = broadcast(given.gates[order[r]]);
                for (int64_t at = 0; at < f; at += LANES) {
                    Vector g = load(gate + at);
                    store(inner + r * f + at, g * sigmoid(g) * load(up + at) * share);
                }
            }
            product_of_rows(inners.row, weights + 2 * f * c, y.row, b.count, c, f);
        }
    }
    if (rows_out != out) add_up(rows_out, out, s);
}

// Computes d_projected[R, 2F] and the gated inner state inner[R, F], which the weights' gradients
// need; the gates' gradients; and every row's part of the input's gradient, rows_out[R, C].
static void rows_backward(const Given& given, const Shape& s, const std::vector<Rows>& blocks,
                          const float* projected, const float* grad, float* d_projected,
                          float* inner, float* d_gates, float* rows_out) {
    int64_t c = s.width, f = s.inner, size = 3 * f * c;
    Memory packed(s.experts * size);
#pragma omp parallel
    {
#pragma omp for schedule(dynamic)
        for (int64_t e = 0; e < s.experts; e++) {
            pack_turned(given.gate_up + e * 2 * f * c, packed + e * size, c, 2 * f);
            pack_turned(given.down + e * c * f, packed + e * size + 2 * f * c, f, c);
        }
        Memory d_inner(MOST * f);
        Places d_inners(d_inner, MOST, f);
#pragma omp for schedule(dynamic)
        for (size_t i = 0; i < blocks.size(); i++) {
            Rows b = blocks[i];
            const float* weights = packed + b.expert * size;
            const int64_t* order = given.order + b.first;
            Places d_y((float*)grad, order, b.count, c, s.choices);
            Places d_gate_up(d_projected + b.first * 2 * f, b.count, 2 * f);
            Places d_x(rows_out, order, b.count, c);
            product_of_rows(d_y.row, weights + 2 * f * c, d_inners.row, b.count, f, c);
            for (int64_t r = 0; r < b.count; r++) {
                int64_t row = b.first + r;
                const float *gate = projected + row * 2 * f, *up = gate + f;
                float* d_gate = d_gate_up.row[r];
                Vector share = broadcast(given.gates[order[r]]), total = broadcast(0.0f);
                for (int64_t at = 0; at < f; at += LANES) {
                    Vector g = load(gate + at), u = load(up + at), s = sigmoid(g), silu = g * s;
                    Vector d = load(d_inner + r * f + at);
                    total += d * silu * u;
                    store(inner + row * f + at, silu * u * share);
                    d *= share;
                    store(d_gate + f + at, d * silu);
                    store(d_gate + at, gate_gradient(d, g, u, s));
                }
                d_gates[order[r]] = sum_lanes(total);
            }
            product_of_rows(d_gate_up.row, weights, d_x.row, b.count, c, 2 * f);
        }
    }
}

static void weights_backward(const Given& given, const Shape& s, const std::vector<Rows>& blocks,
                             const float* grad, const float* d_projected, const float* inner,
                             float* d_gate_up, float* d_down) {
    int64_t c = s.width, f = s.inner;
    std::vector<Part> parts;
    for (int64_t e = 0; e < s.experts; e++) {
        for (int64_t at = 0; at < c; at += WIDE)
            for (int64_t row = 0; row < 2 * f; row += BAND) parts.push_back({e, row, at, false});
        for (int64_t at = 0; at < f; at += WIDE)
            for (int64_t row = 0; row < c; row += BAND) parts.push_back({e, row, at, true});
    }
#pragma omp parallel for schedule(dynamic)
    for (size_t i = 0; i < parts.size(); i++) {
        Part part = parts[i];
        int64_t width = part.down ? f : c, last = part.down ? c : 2 * f;
        int64_t end = least(part.row + BAND, last);
        float* to = (part.down ? d_down : d_gate_up) + part.expert * last * width;
        bool add = false;
        for (const Rows& b : blocks) {
            if (b.expert != part.expert) continue;
            const int64_t* order = given.order + b.first;
            Places token((float*)(part.down ? grad : given.x), order, b.count, c, s.choices);
            int64_t step = part.down ? f : 2 * f;
            Places own((float*)(part.down ? inner : d_projected) + b.first * step, b.count, step);
            const Places &left = part.down ? token : own, &right = part.down ? own : token;
            gradient_of_rows(left.row, part.row, end, right.row, part.column, b.count, to, width,
                             add);
            add = true;
        }
        if (!add)  // an expert without tokens has the gradient 0
            for (int64_t r = part.row; r < end; r++)
                memset(to + r * width + part.column, 0,
                       width_at(part.column, width) * sizeof(float));
    }
}

// rows_out[R, C] holds every row's part of d_x; with one choice per token, it is d_x itself. d_gate_up
// and d_down may be NULL.
extern "C" void experts_backward(const Given* from, const float* projected, const float* grad,
                                 float* d_projected, float* inner, float* rows_out, float* d_x,
                                 float* d_gates, float* d_gate_up, float* d_down,
                                 const Shape* shape) {
    const Given given = *from;
    const Shape s = *shape;
    std::vector<Rows> blocks = blocks_of(given.starts, s.experts);
    rows_backward(given, s, blocks, projected, grad, d_projected, inner, d_gates, rows_out);
    if (rows_out != d_x) add_up(rows_out, d_x, s);
    if (d_down) weights_backward(given, s, blocks, grad, d_projected, inner, d_gate_up, d_down);
}
