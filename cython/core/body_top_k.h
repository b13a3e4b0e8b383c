/* Finds the k largest values of a row, and their ids.  Of equal values, those with the lowest ids are taken. */

/* The k best values so far are in a heap.  Its root is the worst of them: the lowest value, or of equal values the one with the
 * highest id. */
MK_INLINE int worse(float a, int32_t i, float b, int32_t j) { return a < b || (a == b && i > j); }

static void sift(float *values, int32_t *ids, long size, long at) {
    float value = values[at];
    int32_t id = ids[at];
    for (long child; (child = 2 * at + 1) < size; at = child) {
        if (child + 1 < size && worse(values[child + 1], ids[child + 1], values[child], ids[child])) child++;
        if (!worse(values[child], ids[child], value, id)) break;
        values[at] = values[child];
        ids[at] = ids[child];
    }
    values[at] = value;
    ids[at] = id;
}

static void heapify(float *values, int32_t *ids, long size) {
    for (long at = size / 2; at-- > 0;) sift(values, ids, size, at);
}

static void replace_worst(float *values, int32_t *ids, long size, float value, long id) {
    values[0] = value;
    ids[0] = (int32_t)id;
    sift(values, ids, size, 0);
}

/* Sort a heap so that the best value comes first. */
static void sort_heap(float *values, int32_t *ids, long size) {
    for (long last = size; --last > 0;) { /* the worst of the remaining ones goes to their end */
        float value = values[0];
        int32_t id = ids[0];
        values[0] = values[last], ids[0] = ids[last];
        values[last] = value, ids[last] = id;
        sift(values, ids, last, 0);
    }
}

/* Make a heap of the `size` best of d values.  NaN counts as -inf. */
static void heap_best(const float *x, long d, long size, float *values, int32_t *ids) {
    for (long i = 0; i < size; i++) {
        values[i] = x[i] == x[i] ? x[i] : -INFINITY;
        ids[i] = (int32_t)i;
    }
    heapify(values, ids, size);
    for (long i = size; i < d; i += MK_TILE) {
        vf v = vf_row(x, i, d, -INFINITY);
        if (!vf_any_gt(v, vf_set1(values[0]))) continue;
        for (long j = i; j < i + MK_TILE && j < d; j++)
            if (x[j] > values[0]) replace_worst(values, ids, size, x[j], j);
    }
}

enum { PEAKS = 1 << 14 /* groups of values, at most */, FEW = 8 /* for fewer values heap_best is faster */ };
enum { LONGEST = 48, SHORTEST = 4 /* values of a group, at most and at least */ };

/* The same, faster if `size` is small beside d.  The values are divided into groups, and the largest value of each group is its
 * peak.  The `size` highest peaks are values of the row, so at least `size` values are not lower than the lowest of these peaks.
 * Lower values, and groups whose peak is lower, are skipped.  Returns 0 and makes no heap if this would not be faster. */
static int heap_of_high(const float *x, long d, long size, float *values, int32_t *ids) {
    long each = d / (8 * size), count = 0; /* values of a group */
    if (each > LONGEST) each = LONGEST;
    if (each * (PEAKS - MK_TILE) < d) each = d / (PEAKS - MK_TILE) + 1;
    if (size < FEW || each < SHORTEST || each * size > d / 4) return 0;
    const long step = each * MK_TILE;
    float peaks[PEAKS];
    do { /* each lane of a vector has the peak of its own group */
        const long i = count * each;
        vf peak = vf_set1(-INFINITY);
        for (long j = i; j < i + step && j < d; j += MK_TILE) {
            vf v = vf_row(x, j, d, -INFINITY);
            peak = vf_gt(v, peak, v, peak); /* not if v is NaN */
        }
        vf_store(peaks + count, peak);
        count += MK_TILE;
    } while (count * each < d);
    heap_best(peaks, count, size, values, ids);
    const float lowest = values[0];
    if (lowest == -INFINITY) return 0;
    const vf below = vf_set1(nextafterf(lowest, -INFINITY));
    long found = 0;
    for (long i = 0, at = 0; i < d; i += step, at += MK_TILE) {
        if (row_max(peaks + at, MK_TILE) < lowest) continue;
        for (long from = i; from < i + step && from < d; from += MK_TILE) {
            if (!vf_any_gt(vf_row(x, from, d, -INFINITY), below)) continue;
            for (long j = from; j < from + MK_TILE && j < d; j++) {
                if (found == size) {
                    if (x[j] > values[0]) replace_worst(values, ids, size, x[j], j);
                } else if (x[j] >= lowest) {
                    values[found] = x[j];
                    ids[found++] = (int32_t)j;
                    if (found == size) heapify(values, ids, size);
                }
            }
        }
    }
    return 1;
}

enum { RADIX = 11 /* bits */, LONG = 256 /* for fewer values a heap is faster */, MOST = 1 << 14 };

/* An integer that is lower for a better value.  NaN counts as -inf, and -0 as 0. */
MK_INLINE uint32_t order_of(float value) {
    uint32_t bits;
    value = value == value ? value + 0.0f : -INFINITY;
    memcpy(&bits, &value, sizeof bits);
    return bits >> 31 ? bits : ~bits & 0x7fffffffu;
}

/* Sort items by their upper halves; items with equal upper halves keep their order.  `other` has space for as many items.
 * Returns the one of both arrays that has the sorted items. */
static uint64_t *radix_sort(uint64_t *items, uint64_t *other, long count) {
    for (int shift = 32; shift < 64; shift += RADIX) {
        uint32_t places[1 << RADIX] = {0}, before = 0;
        for (long i = 0; i < count; i++) places[items[i] >> shift & ((1 << RADIX) - 1)]++;
        for (int i = 0; i < 1 << RADIX; i++) {
            uint32_t many = places[i];
            places[i] = before;
            before += many;
        }
        for (long i = 0; i < count; i++) other[places[items[i] >> shift & ((1 << RADIX) - 1)]++] = items[i];
        uint64_t *sorted = other;
        other = items;
        items = sorted;
    }
    return items;
}

MK_INLINE float value_of(uint32_t order) {
    uint32_t bits = order >> 31 ? order : ~order & 0x7fffffffu;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static long count_above(const float *x, long d, float bound) {
    vf count = vf_set1(0.0f), one = vf_set1(1.0f);
    EACH(i, d) count = vf_add(count, vf_gt(vf_row(x, i, d, -INFINITY), vf_set1(bound), one, vf_set1(0.0f)));
    return (long)vf_hadd(count); /* exact, for d < 2^24 */
}

/* Find the `size` best of d values, sorted, if `size` is large.  It searches for a bound that not many more values exceed, and
 * sorts these.  Returns 0 if it finds no such bound. */
static int best_of_many(const float *x, long d, long size, float *values, int32_t *ids) {
    if (size < LONG || size > MOST || d >= 1 << 24) return 0;
    uint32_t few = order_of(row_max(x, d)), enough = order_of(-INFINITY);
    long count = count_above(x, d, -INFINITY);
    if (count < size) return 0;
    while (count > size + size / 2 && enough - few > 1) {
        uint32_t middle = few + (enough - few) / 2;
        long found = count_above(x, d, value_of(middle));
        if (found < size)
            few = middle;
        else
            enough = middle, count = found;
    }
    if (count > MOST) return 0;
    uint64_t items[MOST + MK_TILE], other[MOST];
    const float bound = value_of(enough);
    count = 0;
    for (long i = 0; i < d; i += MK_TILE) {
        if (!vf_any_gt(vf_row(x, i, d, -INFINITY), vf_set1(bound))) continue;
        for (long j = i; j < i + MK_TILE && j < d; j++) {
            items[count] = (uint64_t)order_of(x[j]) << 32 | (uint64_t)j;
            count += x[j] > bound;
        }
    }
    const uint64_t *sorted = radix_sort(items, other, count);
    for (long i = 0; i < size; i++) {
        ids[i] = (int32_t)sorted[i];
        values[i] = x[ids[i]];
    }
    return 1;
}

static void top_k(const void *argument, long begin, long end) {
    const mk_small_job *job = argument;
    for (long row = begin; row < end; row++) {
        const float *x = job->a + row * job->a_stride;
        float *values = job->out + row * job->k;
        int32_t *ids = job->ids + row * job->k;
        const long size = job->k < job->d ? job->k : job->d;
        for (long i = size; i < job->k; i++) values[i] = -INFINITY, ids[i] = -1;
        if (!size || best_of_many(x, job->d, size, values, ids)) continue;
        if (!heap_of_high(x, job->d, size, values, ids)) heap_best(x, job->d, size, values, ids);
        sort_heap(values, ids, size);
    }
}
