/* AMX: a second matmul for the path that was included before, with the same bits. */

#include "body_amx_bf16.h"
#include "body_amx_int8.h"

static void amx_matmul(const void *argument, long begin, long end) {
    const mk_matmul_job *job = argument;
    if (job->in_tiles) bf16_matmul(job, begin, end);
    else if (rows_for_tiles(job, job->m)) int8_matmul(job, begin, end);
    else matmul(job, begin, end);
}

static void amx_mixture(const void *argument, long begin, long end) { mixture_of(amx_matmul, argument, begin, end); }
