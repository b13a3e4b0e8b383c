/* Threads: the only place that knows OpenMP, and it does without. */
#include "path.h"

/* `uneven`: items differ in cost, so threads take them one by one; else each gets one contiguous range. */
void mk_run(mk_range range, const void *job, long items, int threads, int uneven) {
    if (threads > items) threads = (int)items;
#ifdef _OPENMP
    if (threads > 1) {
        long parts = uneven ? items : threads;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
        for (long part = 0; part < parts; part++) range(job, items * part / parts, items * (part + 1) / parts);
        return;
    }
#endif
    (void)uneven;
    if (items > 0) range(job, 0, items);
}
