/* What torch does on CPUs in many passes, or one after another. native.py builds and calls this, and says what each
   function is for. All matrices are row-major; a stride is the distance from one row to the next. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif
#define TILE 4
#define STRETCH 64 /* scores made at a time */

/* Small positive definite systems, which are interleaved: lane l of every vector belongs to system l, so that a Cholesky
   factorisation of LANES systems runs as one of vectors, in tiles that stay in registers. */

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));

/* 1 / sqrt, of positive lanes only; *bad counts the others, NaN among them. */
static inline vec inverse_root(vec pivot, int64_t *bad) {
    vec result = {0};
    for (int l = 0; l < LANES; l++) {
        const int positive = pivot[l] > 0;
        *bad += !positive;
        result[l] = 1.0f / __builtin_sqrtf(positive ? pivot[l] : 1.0f);
    }
    return result;
}

/* A tile of rows i.. and columns j.. , less the product of the two strips of the factor to the left of it. */
static inline void update(const vec *rows, const vec *columns, int64_t width, int64_t size, vec c[TILE][TILE]) {
    for (int64_t p = 0; p < width; p++) {
        vec right[TILE];
        for (int b = 0; b < TILE; b++) right[b] = columns[b * size + p];
        for (int a = 0; a < TILE; a++) {
            const vec left = rows[a * size + p];
            for (int b = 0; b < TILE; b++) c[a][b] -= left * right[b];
        }
    }
}

/* Cholesky in place into the lower triangle of (size, size) vectors; the diagonal becomes its reciprocal. */
static void factor(vec *A, int64_t size, int64_t *bad) {
    for (int64_t j = 0; j < size; j += TILE) {
        vec corner[TILE][TILE];
        for (int64_t i = j; i < size; i += TILE) {
            vec c[TILE][TILE];
            for (int a = 0; a < TILE; a++)
                for (int b = 0; b < TILE; b++) c[a][b] = A[(i + a) * size + j + b];
            update(A + i * size, A + j * size, j, size, c);
            if (i == j) {
                for (int b = 0; b < TILE; b++) {
                    for (int p = 0; p < b; p++) c[b][b] -= c[b][p] * c[b][p];
                    c[b][b] = inverse_root(c[b][b], bad);
                    for (int a = b + 1; a < TILE; a++) {
                        for (int p = 0; p < b; p++) c[a][b] -= c[a][p] * c[b][p];
                        c[a][b] *= c[b][b];
                    }
                }
                for (int a = 0; a < TILE; a++)
                    for (int b = 0; b < TILE; b++) corner[a][b] = c[a][b];
            } else {
                for (int b = 0; b < TILE; b++)
                    for (int a = 0; a < TILE; a++) {
                        for (int p = 0; p < b; p++) c[a][b] -= c[a][p] * corner[b][p];
                        c[a][b] *= corner[b][b];
                    }
            }
            for (int a = 0; a < TILE; a++)
                for (int b = 0; b < TILE; b++) A[(i + a) * size + j + b] = c[a][b];
        }
    }
}

/* x becomes the solution of L Lᵀ y = x. */
static void substitute(const vec *L, int64_t size, vec *x) {
    for (int64_t i = 0; i < size; i++) {
        vec value = x[i];
        for (int64_t j = 0; j < i; j++) value -= L[i * size + j] * x[j];
        x[i] = value * L[i * size + i];
    }
    for (int64_t i = size - 1; i >= 0; i--) {
        const vec value = x[i] = x[i] * L[i * size + i];
        for (int64_t j = 0; j < i; j++) x[j] -= L[i * size + j] * value;
    }
}

static int64_t solve_group(const float *matrix, int64_t n, const uint8_t *members, const float *rhs, float *solution,
                           const int64_t *rows, int64_t count, vec *work) {
    int64_t size = 0;
    ivec *index = (ivec *)work; /* the columns that the systems consist of, n where a smaller system is filled up */
    for (int64_t i = 0; i < n + TILE; i++) index[i] = (ivec){0} + (int32_t)n;
    for (int64_t l = 0; l < count; l++) {
        const uint8_t *member = members + rows[l] * n;
        int64_t length = 0;
        for (int64_t column = 0; column < n; column++)
            if (member[column]) index[length++][l] = (int32_t)column;
        if (length > size) size = length;
    }
    size += -size & (TILE - 1);
    vec *x = work + n + TILE, *A = x + n + TILE;
    const int32_t stride = (int32_t)n + 1;
    for (int64_t i = 0; i < size; i++) {
        const ivec base = index[i] * stride;
        for (int64_t j = 0; j <= i; j++) {
            const ivec at = base + index[j];
            vec gathered;
            for (int l = 0; l < LANES; l++) gathered[l] = matrix[at[l]];
            A[i * size + j] = gathered;
        }
        for (int64_t j = i + 1; j < size && j < i + TILE; j++) A[i * size + j] = (vec){0}; /* the rest of a corner tile */
        for (int l = 0; l < LANES; l++) {
            const int32_t column = index[i][l];
            x[i][l] = column < n ? rhs[rows[l < count ? l : 0] * n + column] : 0;
            if (column == n) A[i * size + i][l] = 1;
        }
    }
    int64_t bad = 0;
    factor(A, size, &bad);
    substitute(A, size, x);
    for (int64_t l = 0; l < count; l++)
        for (int64_t i = 0; i < size && index[i][l] < n; i++) solution[rows[l] * n + index[i][l]] = x[i][l];
    return bad;
}

/* For each row r in order[0..count), with s its members: solve matrix[s, s] x = rhs[r, s], x into solution[r, s].

   matrix is (n + 1, n + 1), symmetric, its last row and column zero. members, rhs and solution are (rows, n), solution
   is zero. order should put rows of similar size side by side. Returns how many pivots were not positive, or -1 without
   memory. */
int64_t thanos_solve_subsets(const float *matrix, int64_t n, const uint8_t *members, const float *rhs, float *solution,
                             const int64_t *order, int64_t count, int64_t largest, int threads) {
    int64_t bad = 0;
    const int64_t size = largest + (-largest & (TILE - 1));
    const size_t bytes = sizeof(vec) * (size_t)(2 * (n + TILE) + size * size);
    (void)threads;
#pragma omp parallel num_threads(threads) reduction(+ : bad)
    {
        void *work = NULL;
        const int failed = posix_memalign(&work, sizeof(vec), bytes);
#pragma omp for schedule(dynamic)
        for (int64_t first = 0; first < count; first += LANES) {
            const int64_t rows = count - first < LANES ? count - first : LANES;
            if (!failed) bad += solve_group(matrix, n, members, rhs, solution, order + first, rows, work);
        }
        if (failed) bad = INT64_MIN / 1024;
        free(work);
    }
    return bad < 0 ? -1 : bad;
}

/* Scores |w| scale of rows of cols weights, -inf where frozen: how many are below low, and, into inside, those from
   low to high. inside has room for all of them; thread t begins at row first[t] of it, and says in found[t] how many. */
int64_t thanos_bracket(const float *w, int64_t stride, const uint8_t *frozen, int64_t frozen_stride, const float *scale,
                       int64_t cols, float low, float high, float *inside, const int64_t *first, int64_t *found,
                       int threads) {
    int64_t below = 0;
#pragma omp parallel for num_threads(threads) reduction(+ : below) schedule(static, 1)
    for (int t = 0; t < threads; t++) {
        float *end = inside + first[t] * cols;
        for (int64_t row = first[t]; row < first[t + 1]; row++)
            for (int64_t from = 0; from < cols; from += STRETCH) {
                const int64_t length = cols - from < STRETCH ? cols - from : STRETCH;
                const float *weights = w + row * stride + from;
                const uint8_t *gone = frozen + row * frozen_stride + from;
                float score[STRETCH];
                int32_t lower = 0, within = 0; /* apart from the copying, this becomes vectors */
                for (int64_t j = 0; j < length; j++) {
                    const float free_score = fabsf(weights[j]) * scale[from + j];
                    score[j] = gone[j] ? -INFINITY : free_score;
                    lower += score[j] < low;
                    within += (score[j] >= low) & (score[j] <= high);
                }
                below += lower;
                if (within == 0) continue;
                for (int64_t j = 0; j < length; j++) {
                    *end = score[j]; /* kept only if it is inside */
                    end += (score[j] >= low) & (score[j] <= high);
                }
            }
        found[t] = end - (inside + first[t] * cols);
    }
    return below;
}

/* Of a group the count largest orders are kept, the first of equal ones first. By rank: for few columns. */
static inline void keep_by_rank(const int32_t *order, int64_t width, uint8_t *keep) {
    int32_t count = 0;
    for (int64_t i = 0; i < width; i++) count += keep[i];
    for (int64_t i = 0; i < width; i++) {
        int32_t higher = 0;
        for (int64_t j = 0; j < i; j++) higher += order[j] >= order[i];
        for (int64_t j = i + 1; j < width; j++) higher += order[j] > order[i];
        keep[i] = higher < count;
    }
}

/* The same by halving the range in which the last that is kept must be: a pass for each bit, but for the early end. */
static void keep_by_threshold(const int32_t *order, int64_t width, uint8_t *keep) {
    int32_t count = 0, low = -1, high = 0; /* at least count orders are >= low, and fewer are >= high */
    for (int64_t i = 0; i < width; i++) {
        count += keep[i];
        high = order[i] > high ? order[i] : high;
    }
    if (count == 0) return;
    high += 1;
    int32_t from_low = (int32_t)width, from_high = 0;
    while (from_low != count && high - low > 1) {
        const int32_t middle = low + (high - low) / 2;
        int32_t found = 0;
        for (int64_t i = 0; i < width; i++) found += order[i] >= middle;
        if (found >= count)
            low = middle, from_low = found;
        else
            high = middle, from_high = found;
    }
    if (from_low == count) {
        for (int64_t i = 0; i < width; i++) keep[i] = order[i] >= low;
        return;
    }
    int32_t ties = count - from_high; /* of those that are low, the first */
    for (int64_t i = 0; i < width; i++) {
        const int tied = order[i] == low;
        keep[i] = order[i] > low || (tied && ties > 0);
        ties -= tied;
    }
}

/* The second half of a step of admm.py: from X - W0 in moved, W0 in w, U in u and Z - U - W0 the new mask, U times ratio
   and Z - U - W0. Groups are of width columns and keep as many as they kept. Returns -1 without memory. */
int64_t thanos_project(const float *moved, const float *w, int64_t w_stride, float *u, float *from_original, uint8_t *keep,
                       const uint8_t *frozen, int64_t frozen_stride, const float *scale, int64_t rows, int64_t cols,
                       int64_t width, float relaxation, float ratio, int threads) {
    int64_t bad = 0;
    (void)threads;
#pragma omp parallel num_threads(threads) reduction(+ : bad)
    {
        float *restrict total = malloc(sizeof(float) * (size_t)cols);
        int32_t *restrict order = malloc(sizeof(int32_t) * (size_t)cols);
        const int failed = total == NULL || order == NULL;
#pragma omp for
        for (int64_t row = 0; row < rows; row++) {
            if (failed) continue;
            const float *restrict step = moved + row * cols, *restrict start = w + row * w_stride;
            const uint8_t *restrict gone = frozen + row * frozen_stride;
            float *restrict missed = u + row * cols, *restrict next = from_original + row * cols;
            uint8_t *restrict mask = keep + row * cols;
            for (int64_t j = 0; j < cols; j++) {
                total[j] = start[j] + relaxation * step[j] + (1 - relaxation) * next[j] + (2 - relaxation) * missed[j];
                const union {
                    float score;
                    int32_t order;
                } bits = {fabsf(total[j]) * scale[j]}; /* not negative, and so ordered as integers are */
                order[j] = gone[j] ? -1 : bits.order;
            }
            switch (width) { /* known to the compiler, a width becomes vectors */
                case 4:
                    for (int64_t j = 0; j < cols; j += 4) keep_by_rank(order + j, 4, mask + j);
                    break;
                case 8:
                    for (int64_t j = 0; j < cols; j += 8) keep_by_rank(order + j, 8, mask + j);
                    break;
                default:
                    for (int64_t j = 0; j < cols; j += width)
                        if (width < 32)
                            keep_by_rank(order + j, width, mask + j);
                        else
                            keep_by_threshold(order + j, width, mask + j);
            }
            for (int64_t j = 0; j < cols; j++) {
                const float left = mask[j] ? 0.0f : total[j] * ratio;
                missed[j] = left;
                next[j] = (mask[j] ? total[j] : -left) - start[j];
            }
        }
        bad += failed;
        free(total);
        free(order);
    }
    return bad ? -1 : 0;
}

/* Of every width consecutive scores the count lowest are chosen, the first of equal ones first. chosen is zero. */
void thanos_lowest_in_groups(const float *scores, int64_t groups, int64_t width, int64_t count, uint8_t *chosen,
                             int threads) {
    (void)threads;
#pragma omp parallel for num_threads(threads)
    for (int64_t group = 0; group < groups; group++) {
        const float *score = scores + group * width;
        for (int64_t i = 0; i < width; i++) {
            int64_t lower = 0;
            for (int64_t j = 0; j < i; j++) lower += score[j] <= score[i];
            for (int64_t j = i + 1; j < width; j++) lower += score[j] < score[i];
            chosen[group * width + i] = lower < count;
        }
    }
}
