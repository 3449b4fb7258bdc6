// Causal attention over whole windows, including the rotary positions of queries and keys.
//
// Probabilities are saved for the backward pass. Eight queries at a time stay in the L1 cache from
// scores to output.
//
// Shapes: B batch, T positions (P padded to whole vectors), N heads, M key-value heads, H head
// size of queries and keys, D of values, both multiples of 16.
#include "tile.h"

struct Shape {
    int64_t batch, length, heads, kv_heads, head, value_head;
    // Strides of windows and positions; that of heads is head (value_head).
    int64_t query_batch, query_step, key_batch, key_step, value_batch, value_step;
};

// Probabilities are stored in blocks of 64 queries, each as wide as the keys of its last query.
constexpr int64_t BLOCK = 64;

static inline int64_t block_start(int64_t block) { return BLOCK * BLOCK * block * (block + 1) / 2; }
static inline int64_t block_width(int64_t block, int64_t length) {
    return least(BLOCK * (block + 1), padded(length));
}

extern "C" int64_t attention_kept(int64_t length) {
    int64_t last = (padded(length) - 1) / BLOCK;
    return block_start(last) + (padded(length) - last * BLOCK) * block_width(last, length);
}

// A tile: 8 x 2 sums, or 8 x 1, leave registers for operands.
constexpr int64_t ROWS = 8;
constexpr int COLUMNS = WIDE_VECTORS / 2;

// c[8, n] (+)= a[8, k] b[k, n]; n is a multiple of LANES; a's element (i, j) is at i * rows + j * columns.
// Inlined, since one of the two strides is 1 everywhere.
INLINE void product(const float* a, int64_t rows, int64_t columns, const float* b, int64_t ldb,
                    int64_t k, float* c, int64_t ldc, int64_t n, bool add) {
    for (int64_t at = 0; at < n; at += COLUMNS * LANES)
        sized<1, COLUMNS>(1, n - at, [&](auto, auto v) {
            tile<ROWS, v.value>(
                k, BODY(int r, int64_t j) { return a[r * rows + j * columns]; },
                BODY(int64_t j) { return b + at + j * ldb; },
                BODY(int r) { return c + at + r * ldc; }, add);
        });
}

// One head at position t, rotated (back: inversely) and multiplied by scale; without angles only
// scaled.
static inline void turn(const float* from, float* to, const float* cos, const float* sin,
                        int64_t t, int64_t head, float scale, bool back) {
    int64_t at = t * head / 2;
    if (cos) return rotate<Eight>(from, to, cos + at, sin + at, head, scale, back);
    for (int64_t j = 0; j < head; j += LANES) store(to + j, load(from + j) * broadcast(scale));
}

// All positions of one head, [P, head], with zeros after the last.
static void gather(const float* from, int64_t step, float* to, const float* cos, const float* sin,
                   int64_t length, int64_t head, float scale) {
    for (int64_t t = 0; t < length; t++)
        turn(from + t * step, to + t * head, cos, sin, t, head, scale, false);
    memset(to + length * head, 0, (padded(length) - length) * head * sizeof(float));
}

// Softmax of the first `seen` scores of a row; the others up to `width` become 0.
static inline void softmax(float* row, int64_t seen, int64_t width) {
    int64_t last = (seen - 1) / LANES * LANES;
    Whole counts = lanes_before(last, seen);
    Vector tail = counts ? load(row + last) : broadcast(-INFINITY), top = tail;
    for (int64_t j = 0; j < last; j += LANES) top = larger(load(row + j), top);
    Vector shift = broadcast(max_lane(top)), total = broadcast(0.0f);
    for (int64_t j = 0; j < last; j += LANES) {
        Vector e = exp_of(load(row + j) - shift);
        total += e;
        store(row + j, e);
    }
    tail = counts ? exp_of(tail - shift) : broadcast(0.0f);
    Vector scale = broadcast(1.0f / sum_lanes(total + tail));
    for (int64_t j = 0; j < last; j += LANES) store(row + j, load(row + j) * scale);
    store(row + last, tail * scale);
    for (int64_t j = last + LANES; j < width; j += LANES) store(row + j, broadcast(0.0f));
}

extern "C" void attention_forward(const float* query, const float* key, const float* value,
                                  const float* cos, const float* sin, float* out, float* kept,
                                  const Shape* shape) {
    const Shape s = *shape;
    int64_t group = s.heads / s.kv_heads, wide = padded(s.length);
    float scale = 1.0f / sqrtf((float)s.head);
#pragma omp parallel for schedule(static)
    for (int64_t job = 0; job < s.batch * s.kv_heads; job++) {
        int64_t b = job / s.kv_heads, m = job % s.kv_heads;
        Memory keys(wide * s.head);  // [H, P]
        Memory queries(wide * s.head);
        Memory mixed(ROWS * s.value_head);
        const float* values = value + b * s.value_batch + m * s.value_head;
        gather(key + b * s.key_batch + m * s.head, s.key_step, queries, cos, sin, s.length, s.head,
               1.0f);
        pack_panel(queries, keys, wide, s.head, 0, wide);
        for (int64_t n = m * group; n < (m + 1) * group; n++) {
            gather(query + b * s.query_batch + n * s.head, s.query_step, queries, cos, sin,
                   s.length, s.head, scale);
            float* own = kept + (b * s.heads + n) * attention_kept(s.length);
            for (int64_t t = 0; t < s.length; t += ROWS) {
                int64_t block = t / BLOCK, ld = block_width(block, s.length);
                int64_t width = padded(t + ROWS);
                float* probs = own + block_start(block) + (t - block * BLOCK) * ld;
                product(queries + t * s.head, s.head, 1, keys, wide, s.head, probs, ld, width,
                        false);
                for (int64_t i = 0; i < ROWS; i++) {
                    if (t + i < s.length)
                        softmax(probs + i * ld, t + i + 1, width);
                    else
                        memset(probs + i * ld, 0, width * sizeof(float));
                }
                product(probs, ld, 1, values, s.value_step, least(width, s.length), mixed,
                        s.value_head, s.value_head, false);
                for (int64_t i = 0; i < least(ROWS, s.length - t); i++)
                    memcpy(out + ((b * s.length + t + i) * s.heads + n) * s.value_head,
                           mixed + i * s.value_head, s.value_head * sizeof(float));
            }
        }
    }
}

// Gradients have the strides of their inputs.
extern "C" void attention_backward(const float* query, const float* key, const float* value,
                                   const float* cos, const float* sin, const float* kept,
                                   const float* grad, float* d_query, float* d_key, float* d_value,
                                   const Shape* shape) {
    const Shape s = *shape;
    int64_t group = s.heads / s.kv_heads, wide = padded(s.length);
    float scale = 1.0f / sqrtf((float)s.head);
#pragma omp parallel for schedule(static)
    for (int64_t job = 0; job < s.batch * s.kv_heads; job++) {
        int64_t b = job / s.kv_heads, m = job % s.kv_heads;
        Memory keys(wide * s.head);
        Memory values(wide * s.value_head);  // [D, P]
        Memory queries(wide * s.head);
        Memory grads(wide * s.value_head);
        Memory d_keys(wide * s.head);
        Memory d_values(wide * s.value_head);
        Memory d_queries(ROWS * s.head);
        Memory d_scores(BLOCK * wide);
        memset(d_keys, 0, wide * s.head * sizeof(float));
        memset(d_values, 0, wide * s.value_head * sizeof(float));
        gather(key + b * s.key_batch + m * s.head, s.key_step, keys, cos, sin, s.length, s.head,
               1.0f);
        gather(value + b * s.value_batch + m * s.value_head, s.value_step, grads, nullptr, nullptr,
               s.length, s.value_head, 1.0f);
        pack_panel(grads, values, wide, s.value_head, 0, wide);
        for (int64_t n = m * group; n < (m + 1) * group; n++) {
            gather(query + b * s.query_batch + n * s.head, s.query_step, queries, cos, sin,
                   s.length, s.head, scale);
            gather(grad + (b * s.length * s.heads + n) * s.value_head, s.heads * s.value_head,
                   grads, nullptr, nullptr, s.length, s.value_head, 1.0f);
            const float* own = kept + (b * s.heads + n) * attention_kept(s.length);
            for (int64_t first = 0; first < s.length; first += BLOCK) {
                int64_t block = first / BLOCK, ld = block_width(block, s.length);
                int64_t end = (least(first + BLOCK, s.length) + ROWS - 1) / ROWS * ROWS;
                const float* probs = own + block_start(block);
                for (int64_t t = first; t < end; t += ROWS) {
                    int64_t width = padded(t + ROWS);
                    float* rows = d_scores + (t - first) * ld;
                    product(grads + t * s.value_head, s.value_head, 1, values, wide, s.value_head,
                            rows, ld, width, false);
                    for (int64_t i = 0; i < ROWS; i++) {
                        const float* p = probs + (t - first + i) * ld;
                        float* d = rows + i * ld;
                        Vector total = broadcast(0.0f);
                        for (int64_t j = 0; j < width; j += LANES)
                            total += load(p + j) * load(d + j);
                        Vector mean = broadcast(sum_lanes(total));
                        for (int64_t j = 0; j < width; j += LANES)
                            store(d + j, load(p + j) * (load(d + j) - mean));
                    }
                    product(rows, ld, 1, keys, s.head, width, d_queries, s.head, s.head, false);
                    for (int64_t i = 0; i < least(ROWS, s.length - t); i++) {
                        int64_t at = t + i;
                        turn(d_queries + i * s.head,
                             d_query + b * s.query_batch + at * s.query_step + n * s.head, cos, sin,
                             at, s.head, scale, true);
                    }
                }
                // Keys up to the block's last query; no query before a key's own attends to it.
                for (int64_t j = 0; j < end; j += ROWS) {
                    int64_t from = j > first ? j : first;
                    int64_t at = (from - first) * ld + j;
                    product(d_scores + at, 1, ld, queries + from * s.head, s.head, end - from,
                            d_keys + j * s.head, s.head, s.head, true);
                    product(probs + at, 1, ld, grads + from * s.value_head, s.value_head,
                            end - from, d_values + j * s.value_head, s.value_head, s.value_head,
                            true);
                }
            }
        }
        for (int64_t t = 0; t < s.length; t++) {
            turn(d_keys + t * s.head, d_key + b * s.key_batch + t * s.key_step + m * s.head, cos,
                 sin, t, s.head, 1.0f, true);
            memcpy(d_value + b * s.value_batch + t * s.value_step + m * s.value_head,
                   d_values + t * s.value_head, s.value_head * sizeof(float));
        }
    }
}
