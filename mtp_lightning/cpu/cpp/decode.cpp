// Fused decode steps: few new tokens through whole blocks in one call.
//
// Pre-norm blocks of grouped-query attention and SwiGLU. Every token is computed separately, in an
// order of operations that depends only on its position: it has the same bits alone and with others.
//
// Shapes: M tokens (B rows of T), C width, N heads, P key heads, H head size, F inner width, S
// capacity of the cache, whose entry of a token is [2 P, H], keys first.
#include <omp.h>

#include <vector>

#include "skinny.h"
#include "unpack.h"

struct Block {
    int64_t width, heads, kv_heads, head, inner;
    double eps, head_eps;
    const float *attention_norm, *feed_forward_norm;  // [C]
    const float *query_norm, *key_norm, *bias;        // [H], [H], [(N + 2 P) H], or NULL
    Packed qkv, out, gate_up, down;
};

// A sequential module's two norms and the projection of their concatenated results.
struct Join {
    int64_t width, hidden_first;
    double embedded_eps, hidden_eps;
    const float *embedded_norm, *hidden_norm;
    Packed projection;
};

struct Pass {
    int64_t rows, length, capacity;
    const int64_t* starts;    // [B], the first position of every row's new tokens
    const int64_t* parents;   // [T], every token's parent in a tree; NULL for a chain
    const float *cos, *sin;   // [S, H], those of the angles in the second halves
    float* const* entries;    // for every block [B, S, 2 P, H]
};

static inline void norm(const float* x, const float* gain, float* out, int64_t width, double eps) {
    Vector squares = broadcast(0.0f);
    columns(width, [&](int64_t at, int64_t n) {
        Vector v = take(x + at, n);
        squares = multiply_add(v, v, squares);
    });
    Vector scale = broadcast((float)(1.0 / sqrt((double)sum_lanes(squares) / width + eps)));
    columns(width, [&](int64_t at, int64_t n) {
        put(out + at, take(x + at, n) * scale * take(gain + at, n), n);
    });
}

// One step of summing two vectors across lanes: pairs of lanes of `a` are added into the lanes without
// STEP's bit, those of `b` into the lanes with it.
template <int STEP>
static inline Vector folded(Vector a, Vector b) {
    Vector rows[LANES] = {a};
    rows[STEP] = b;
    exchange<STEP>(rows);
    return rows[0] + rows[STEP];
}

// The sums across the lanes of 2 STEP vectors, LANES of them, as one vector.
template <int STEP = LANES / 2>
static inline Vector sums_of(Vector* rows) {
#pragma GCC unroll 8
    for (int i = 0; i < STEP; i++) rows[i] = folded<STEP>(rows[i], rows[i + STEP]);
    if constexpr (STEP > 1) return sums_of<STEP / 2>(rows);
    return rows[0];
}

// For each new token: the number of new tokens it attends to, then their indices, ending with itself.
// A token of a tree has the position of its index on this path.
static void find_paths(const Pass& pass, std::vector<int64_t>& paths) {
    int64_t t = pass.length, step = t + 1;
    paths.resize(t * step);
    for (int64_t i = 0; i < t; i++) {
        int64_t parent = pass.parents ? pass.parents[i] : i - 1, *path = paths.data() + i * step;
        const int64_t* before = paths.data() + parent * step;
        int64_t n = parent < 0 ? 0 : before[0];
        for (int64_t j = 1; j <= n; j++) path[j] = before[j];
        path[0] = n + 1;
        path[n + 1] = i;
    }
}

// Makes room for n numbers.
static inline void grow(std::vector<float>& memory, int64_t n) {
    if ((int64_t)memory.size() < n) memory.resize(n);
}

// The numerators of the softmax of scores[seen], in place, with zeros up to a whole vector. Returns 1 / their
// sum.
static float numerators(float* scores, int64_t seen) {
    Vector top = broadcast(-INFINITY), total = broadcast(0.0f);
    for (int64_t s = 0; s < seen; s += LANES) top = larger(load(scores + s), top);
    Vector shift = broadcast(max_lane(top));
    for (int64_t s = 0; s < seen; s += LANES) {
        Vector e = lanes_before(s, seen) ? exp_of(load(scores + s) - shift) : broadcast(0.0f);
        total += e;
        store(scores + s, e);
    }
    return 1.0f / sum_lanes(total);
}

// Positions whose values are read together, to stay in the first cache for all queries.
constexpr int64_t TOGETHER = 64;

// Attention of the G adjacent queries that share a key head, over all positions before `start` and over a
// path of new tokens. Keys and values have the stride `step`. The path is summed as if it were stored
// from `start` on. HEAD is the head size H, known to the compiler; 0 for any other size.
template <int HEAD>
static void attend(const float* queries, int64_t group, const float* keys, const float* values,
                   int64_t step, int64_t start, const int64_t* path, int64_t head,
                   std::vector<float>& memory, float* out) {
    float scale = 1.0f / sqrtf((float)head);
    int64_t seen = start + path[0], room = padded(seen), wide = padded(head);
    grow(memory, group * (room + 4 * wide + 1));
    float *scores = memory.data(), *sums = scores + group * room, *factors = sums + group * 4 * wide;
    auto stored = [&](int64_t s) { return s * step; };
    // Positions after the last one are clamped; they get the weight 0.
    auto place = [&](int64_t s) {
        s = s < seen ? s : seen - 1;
        return (s < start ? s : start + path[s - start + 1]) * step;
    };
    auto score_all = [&](const float* query, int64_t s, auto place) {
        Vector dots[LANES];
        times<LANES>(BODY(int i) {
            const float* key = keys + place(s + i);
            dots[i] = broadcast(0.0f);
            auto add = BODY(int64_t at, int64_t m) {
                dots[i] = multiply_add(take(query + at, m), take(key + at, m), dots[i]);
            };
            if constexpr (HEAD)
                times<HEAD / LANES>(BODY(int v) { add(v * LANES, LANES); });
            else
                columns(head, add);
        });
        return sums_of(dots) * broadcast(scale);
    };
    for (int64_t s = 0; s < seen; s += LANES)
        for (int64_t g = 0; g < group; g++) {
            const float* query = queries + g * head;
            Vector score =
                s + LANES <= start ? score_all(query, s, stored) : score_all(query, s, place);
            store(scores + g * room + s, lanes_before(s, seen) ? score : broadcast(-INFINITY));
        }
    for (int64_t g = 0; g < group; g++) factors[g] = numerators(scores + g * room, seen);
    // Four independent sums of every query, so that none waits for the previous one.
    memset(sums, 0, group * 4 * wide * sizeof(float));
    auto mix = [&](int64_t first, int64_t end, const float* weights, float* to, int64_t at, auto v) {
        constexpr int V = v.value;
        int64_t m = V > 1 ? LANES : least(LANES, head - at);
        Vector mixed[4][V];
        each_vector<4, V>(BODY(int i, int u) { mixed[i][u] = load(to + i * wide + u * LANES); });
        auto mix_four = BODY(int64_t s, auto place) {
            times<4>(BODY(int i) {
                const float* value = values + place(s + i) + at;
                Vector weight = broadcast(weights[s + i]);
                times<V>(BODY(int u) {
                    mixed[i][u] = multiply_add(weight, take(value + u * LANES, m), mixed[i][u]);
                });
            });
        };
        int64_t s = first;
        for (; s + 4 <= least(start, end); s += 4) mix_four(s, stored);
        for (; s < end; s += 4) mix_four(s, place);
        each_vector<4, V>(BODY(int i, int u) { store(to + i * wide + u * LANES, mixed[i][u]); });
    };
    for (int64_t s = 0; s < seen; s += TOGETHER)
        for (int64_t g = 0; g < group; g++)
            for (int64_t at = 0; at < head;)
                sized<1, REGISTERS / 8>(1, head - at < LANES ? LANES : head - at, [&](auto, auto v) {
                    float* to = sums + g * 4 * wide + at;
                    mix(s, least(seen, s + TOGETHER), scores + g * room, to, at, v);
                    at += v.value * LANES;
                });
    for (int64_t g = 0; g < group; g++) {
        const float* from = sums + g * 4 * wide;
        columns(head, [&](int64_t at, int64_t m) {
            auto part = BODY(int i) { return load(from + i * wide + at); };
            Vector sum = (part(0) + part(1)) + (part(2) + part(3));
            put(out + g * head + at, sum * broadcast(factors[g]), m);
        });
    }
}

struct Scratch {
    std::vector<float> normed, qkv, mixed, gate_up, inner;
    std::vector<int64_t> paths;
    void fit(int64_t rows, const Block& b) {
        grow(normed, rows * b.width);
        grow(qkv, rows * (b.heads + 2 * b.kv_heads) * b.head);
        grow(mixed, rows * b.heads * b.head);
        grow(gate_up, rows * 2 * b.inner);
        grow(inner, rows * b.inner);
    }
};

// Rotates a token's queries and keys, and stores its keys and values in the cache.
static void store_token(const Block& b, const Pass& pass, float* qkv, float* entry,
                        int64_t position) {
    int64_t turned = b.heads + b.kv_heads, all_heads = turned + b.kv_heads;
    int64_t angles = position * b.head + b.head / 2;
    if (b.bias)
        for (int64_t j = 0; j < all_heads * b.head; j++) qkv[j] += b.bias[j];
    for (int64_t h = 0; h < turned; h++) {
        float* head = qkv + h * b.head;
        const float* gain = h < b.heads ? b.query_norm : b.key_norm;
        if (gain) norm(head, gain, head, b.head, b.head_eps);
        rotate<float>(head, head, pass.cos + angles, pass.sin + angles, b.head, 1.0f, false);
    }
    memcpy(entry, qkv + b.heads * b.head, 2 * b.kv_heads * b.head * sizeof(float));
}

static void attention(const Block& b, const Pass& pass, float* entries, Scratch& s) {
    int64_t tokens = pass.rows * pass.length, per_token = (b.heads + 2 * b.kv_heads) * b.head;
    int64_t size = 2 * b.kv_heads * b.head, group = b.heads / b.kv_heads, work = 0;
    const int64_t* paths = s.paths.data();
    for (int64_t i = 0; i < tokens; i++) {
        int64_t row = i / pass.length, token = i % pass.length, start = pass.starts[row];
        int64_t position = start + paths[token * (pass.length + 1)] - 1;
        float* entry = entries + (row * pass.capacity + start + token) * size;
        store_token(b, pass, s.qkv.data() + i * per_token, entry, position);
        work += position * b.heads * b.head;
    }
    const float* qkv = s.qkv.data();
    float* mixed = s.mixed.data();
    // A key head's queries are one job, or several where threads would otherwise have less than two each.
    int64_t threads = omp_get_max_threads(), whole = tokens * b.kv_heads;
    int64_t parts = threads > 1 ? least(group, (2 * threads + whole - 1) / whole) : 1;
#pragma omp parallel for schedule(static) if (work > WORTH_THREADS)
    for (int64_t i = 0; i < whole * parts; i++) {
        static thread_local std::vector<float> memory;
        int64_t token = i / parts / b.kv_heads, key_head = i / parts % b.kv_heads;
        int64_t row = token / pass.length, part = i % parts, head = key_head * group;
        int64_t first = head + part * group / parts, end = head + (part + 1) * group / parts;
        const int64_t* path = paths + token % pass.length * (pass.length + 1);
        const float* keys = entries + row * pass.capacity * size + key_head * b.head;
        auto attend_as = [&](auto size_known) {
            attend<size_known.value>(qkv + token * per_token + first * b.head, end - first, keys,
                                     keys + b.kv_heads * b.head, size, pass.starts[row], path,
                                     b.head, memory, mixed + (token * b.heads + first) * b.head);
        };
        switch (b.head) {
            case 32: attend_as(std::integral_constant<int, 32>{}); break;
            case 64: attend_as(std::integral_constant<int, 64>{}); break;
            case 128: attend_as(std::integral_constant<int, 128>{}); break;
            default: attend_as(std::integral_constant<int, 0>{});
        }
    }
}

static inline Vector silu(Vector x) { return x / (broadcast(1.0f) + exp_of(-x)); }

static void block(const Block& b, const Pass& pass, float* entries, float* x, Scratch& s) {
    int64_t tokens = pass.rows * pass.length, c = b.width, f = b.inner, mixed = b.heads * b.head;
    s.fit(tokens, b);
    for (int64_t i = 0; i < tokens; i++)
        norm(x + i * c, b.attention_norm, s.normed.data() + i * c, c, b.eps);
    skinny(s.normed.data(), b.qkv, s.qkv.data(), tokens, (b.heads + 2 * b.kv_heads) * b.head, c,
           false);
    attention(b, pass, entries, s);
    skinny(s.mixed.data(), b.out, x, tokens, c, mixed, true);
    for (int64_t i = 0; i < tokens; i++)
        norm(x + i * c, b.feed_forward_norm, s.normed.data() + i * c, c, b.eps);
    skinny(s.normed.data(), b.gate_up, s.gate_up.data(), tokens, 2 * f, c, false);
    for (int64_t i = 0; i < tokens; i++) {
        const float *gate = s.gate_up.data() + 2 * i * f, *up = gate + f;
        float* to = s.inner.data() + i * f;
        columns(f, [&](int64_t at, int64_t n) {
            put(to + at, silu(take(gate + at, n)) * take(up + at, n), n);
        });
    }
    skinny(s.inner.data(), b.down, x, tokens, c, f, true);
}

// out = x / sqrt(mean(x^2) + eps) * gain for every row.
extern "C" void decode_norm(const float* x, const float* gain, float* out, int64_t rows,
                            int64_t width, double eps) {
    for (int64_t i = 0; i < rows; i++) norm(x + i * width, gain, out + i * width, width, eps);
}

// x[M, C] through n blocks, in place; with a gain, also normed[M, C] = norm(x).
extern "C" void decode_blocks(const Block* blocks, int64_t n, const Pass* pass, float* x,
                              const float* gain, float* normed, double eps) {
    static thread_local Scratch scratch;
    find_paths(*pass, scratch.paths);
    for (int64_t i = 0; i < n; i++) block(blocks[i], *pass, pass->entries[i], x, scratch);
    if (gain) decode_norm(x, gain, normed, pass->rows * pass->length, blocks[0].width, eps);
}

// Index of token i of a pass (counted over all rows) in a buffer [B, S].
static inline int64_t place_of(const Pass& pass, int64_t i) {
    return i / pass.length * pass.capacity + pass.starts[i / pass.length] + i % pass.length;
}

// Copies the results of a pass, from[M, C], to the positions of its tokens in buffer[B, S, C].
static void keep(const Pass& pass, const float* from, float* buffer, int64_t width) {
    for (int64_t i = 0; i < pass.rows * pass.length; i++)
        memcpy(buffer + place_of(pass, i) * width, from + i * width, width * sizeof(float));
}

// Concatenates the normed embedding and hidden state of one token into both[2 C].
static inline void side_by_side(const Join& join, const float* embedded, const float* hidden,
                                float* both) {
    int64_t c = join.width;
    norm(embedded, join.embedded_norm, both + join.hidden_first * c, c, join.embedded_eps);
    norm(hidden, join.hidden_norm, both + !join.hidden_first * c, c, join.hidden_eps);
}

// The input of a module's block, out[M, C], from embeddings and hidden states [M, C].
extern "C" void decode_join(const Join* join, const float* embedded, const float* hidden,
                            float* out, int64_t tokens) {
    static thread_local std::vector<float> both;
    int64_t c = join->width;
    grow(both, tokens * 2 * c);
    for (int64_t i = 0; i < tokens; i++)
        side_by_side(*join, embedded + i * c, hidden + i * c, both.data() + i * 2 * c);
    skinny(both.data(), join->projection, out, tokens, c, 2 * c, false);
}

// An embedding [V, C]: its rows, or NULL and the packed weight that has them.
struct Embedding {
    const float* rows;
    Packed packed;
    int64_t size;
};

static inline void look_up(const Embedding& from, int64_t id, float* out, int64_t width) {
    if (from.rows)
        memcpy(out, from.rows + id * width, width * sizeof(float));
    else
        unpack_row(from.packed, id, out, from.size, width);
}

// Blocks with the norm after them, between the embedding and the head.
struct Decoder {
    int64_t blocks, outputs;
    double eps;
    const Block* block;
    const float* gain;  // [C]
    Embedding embedding;
    Packed head;
};

// A module that drafts.
struct Draft : Decoder {
    int64_t ahead;
    const Join* join;
};

// A pass of a module from token ids to logits; its states are written to `after` for the next depth.
extern "C" void decode_draft(const Draft* draft, const Pass* pass, const int64_t* ids,  // [B, S]
                             const float* before, float* after,  // [B, S, C]; NULL for the deepest
                             const int64_t* newest,              // [B], index among the pass's tokens
                             float* last, float* logits) {       // [B, C], [B, V]
    static thread_local std::vector<float> both, x, normed, embedded;
    const Join& join = *draft->join;
    int64_t c = join.width, t = pass->length, tokens = pass->rows * t;
    grow(both, tokens * 2 * c), grow(x, tokens * c), grow(normed, tokens * c), grow(embedded, c);
    for (int64_t i = 0; i < tokens; i++) {
        int64_t at = place_of(*pass, i);
        look_up(draft->embedding, ids[at + draft->ahead], embedded.data(), c);
        side_by_side(join, embedded.data(), before + at * c, both.data() + i * 2 * c);
    }
    skinny(both.data(), join.projection, x.data(), tokens, c, 2 * c, false);
    decode_blocks(draft->block, draft->blocks, pass, x.data(), draft->gain, normed.data(), draft->eps);
    if (after) keep(*pass, normed.data(), after, c);
    for (int64_t row = 0; row < pass->rows; row++)
        memcpy(last + row * c, normed.data() + (row * t + newest[row]) * c, c * sizeof(float));
    skinny(last, draft->head, logits, pass->rows, draft->outputs, c, false);
}

// The trunk's state that the modules branch from.
enum Branch { BEFORE_LAST, NORMED_BEFORE_LAST, LAST_BLOCK, FINAL };

struct Trunk : Decoder {
    int64_t branch;
};

// A pass of a trunk from token ids to logits[M, V]; one of its states is stored for the modules.
extern "C" void decode_trunk(const Trunk* trunk, const Pass* pass, const int64_t* ids,  // [B, S]
                             float* states,  // [B, S, C], or NULL if there are no modules
                             float* logits) {
    static thread_local std::vector<float> x, normed;
    int64_t c = trunk->block->width, tokens = pass->rows * pass->length;
    grow(x, tokens * c), grow(normed, tokens * c);
    auto store_if = [&](Branch branch, const std::vector<float>& from) {
        if (states && trunk->branch == branch) keep(*pass, from.data(), states, c);
    };
    for (int64_t i = 0; i < tokens; i++)
        look_up(trunk->embedding, ids[place_of(*pass, i)], x.data() + i * c, c);
    int64_t last = trunk->blocks - 1;
    decode_blocks(trunk->block, last, pass, x.data(), NULL, NULL, 0);
    store_if(BEFORE_LAST, x);
    if (states && trunk->branch == NORMED_BEFORE_LAST) {
        decode_norm(x.data(), trunk->gain, normed.data(), tokens, c, trunk->eps);
        store_if(NORMED_BEFORE_LAST, normed);
    }
    Pass own = *pass;
    own.entries += last;
    decode_blocks(trunk->block + last, 1, &own, x.data(), trunk->gain, normed.data(), trunk->eps);
    store_if(LAST_BLOCK, x);
    store_if(FINAL, normed);
    skinny(normed.data(), trunk->head, logits, tokens, trunk->outputs, c, false);
}

// out[M, N] = x[M, K] weight.T
extern "C" void decode_linear(const float* x, const void* weight, float* out, int64_t rows,
                              int64_t outputs, int64_t inputs, int64_t kind) {
    skinny(x, Packed{weight, kind}, out, rows, outputs, inputs, false);
}

// Whether this CPU multiplies bytes, which products of integers need.
extern "C" int64_t multiplies_bytes() { return has_byte_products(); }
