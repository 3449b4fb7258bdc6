// Tokens drawn from distributions, and drafts judged by them, in one pass over each distribution.
//
// A draw inverts the cumulative sum in fp64: the sums of blocks of tokens give the block, and the
// block's tokens the token. Rows are independent.
#include <vector>

#include "vector.h"

constexpr int64_t BLOCK = 256;

// The first token at which the cumulative sum exceeds `share` of the total, and thus one whose weight
// is above 0; -1 if there is none. block(at, m) returns the m weights from token `at` on.
template <typename Block>
static int64_t token_at(double share, int64_t width, Block block) {
    std::vector<double> sums;
    double total = 0.0;
    for (int64_t at = 0; at < width; at += BLOCK) {
        int64_t m = least(BLOCK, width - at), j = 0;
        const float* weights = block(at, m);
        double lanes[LANES] = {}, sum = 0.0;
        for (; j + LANES <= m; j += LANES)
            for (int i = 0; i < LANES; i++) lanes[i] += weights[j + i];
        for (; j < m; j++) sum += weights[j];
        for (double lane : lanes) sum += lane;
        sums.push_back(sum);
        total += sum;
    }
    double aim = share * total;
    int64_t chosen = 0, last = (int64_t)sums.size() - 1;
    auto pass = [&](double sum) { aim = fmax(aim - sum, 0.0); };  // the difference is rounded
    while (chosen <= last && !(aim < sums[chosen])) pass(sums[chosen++]);
    if (chosen > last) {  // rounding has put the aim at the total, or there are no weights
        while (last >= 0 && !(sums[last] > 0.0)) last--;
        if (last < 0) return -1;
        chosen = last, aim = INFINITY;
    }
    int64_t at = chosen * BLOCK, m = least(BLOCK, width - at), token = -1;
    const float* weights = block(at, m);
    for (int64_t j = 0; j < m; j++) {
        if (weights[j] > 0.0f) token = at + j;
        if (aim < weights[j]) break;
        pass(weights[j]);
    }
    return token;
}

static int64_t drawn(const float* probs, int64_t width, double share) {
    int64_t token = token_at(share, width, [&](int64_t at, int64_t) { return probs + at; });
    return token < 0 ? width - 1 : token;
}

// From max(p - q, 0), where q holds the first `short_width` tokens; -1 if that is 0 everywhere.
static int64_t drawn_from_rest(const float* p, const float* q, int64_t width, int64_t short_width,
                               double share) {
    float rest[BLOCK];
    return token_at(share, width, [&](int64_t at, int64_t m) -> const float* {
        if (at >= short_width) return p + at;
        int64_t both = least(m, short_width - at);
        for (int64_t j = 0; j < both; j++) {
            float more = p[at + j] - q[at + j];
            rest[j] = more > 0.0f ? more : 0.0f;
        }
        memcpy(rest + both, p + at + both, (m - both) * sizeof(float));
        return rest;
    });
}

// tokens[R] from probs[R, width], by one number of [0, 1) each.
extern "C" void draw_tokens(const float* probs, const double* noise, int64_t* tokens, int64_t rows,
                            int64_t width) {
#pragma omp parallel for schedule(static) if (rows > 1)
    for (int64_t row = 0; row < rows; row++)
        tokens[row] = drawn(probs + row * width, width, noise[row]);
}

// The rule of decoding/verification.py::accept_or_resample, for p[R, drafts + 1, width] and
// q[R, drafts, short_width]; tokens is [R, drafts + 1].
extern "C" void judge_drafts(const float* p, const float* q, const int64_t* draft,
                             const double* noise, const double* own_noise, const int64_t* limits,
                             int64_t* tokens, int64_t* accepted, int64_t rows, int64_t drafts,
                             int64_t width, int64_t short_width) {
#pragma omp parallel for schedule(static) if (rows > 1)
    for (int64_t row = 0; row < rows; row++) {
        const float* p_row = p + row * (drafts + 1) * width;
        const float* q_row = q + row * drafts * short_width;
        int64_t* row_tokens = tokens + row * (drafts + 1);
        int64_t limit = least(limits[row], drafts), n = 0;
        for (; n < limit; n++) {
            int64_t token = draft[row * drafts + n];
            double reached = noise[row * drafts + n] * q_row[n * short_width + token];
            if (!(reached < p_row[n * width + token])) break;
        }
        const float *p_own = p_row + n * width, *q_own = q_row + n * short_width;
        double share = own_noise[row];
        int64_t own = n < limit ? drawn_from_rest(p_own, q_own, width, short_width, share) : -1;
        memcpy(row_tokens, draft + row * drafts, drafts * sizeof(int64_t));
        // Callers store all tokens and use those up to n, so the rest must be valid ones.
        row_tokens[n] = row_tokens[drafts] = own < 0 ? drawn(p_own, width, share) : own;
        accepted[row] = n;
    }
}
