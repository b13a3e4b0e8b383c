/* Memory of calls.  A large piece is kept for the next call, and lies in huge pages: each page of a new one costs a fault,
 * and those of one prompt took an eighth of its time.  One beyond KEPT is not: it would come on top of the arrays that
 * are made between calls, and its pages are huge, so that they cost little. */
#define _GNU_SOURCE
#include <stdatomic.h>
#include <stdlib.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include "memory.h"

enum { LINE = 64, LARGE = 1 << 20, HUGE_PAGE = 1 << 21, KEPT = 32 << 20 };

/* Before the memory, in a cache line of its own. */
typedef struct {
    size_t size;
} header;

static _Atomic(header *) kept;

void *mk_take_memory(size_t size) {
    void *memory;
    size += LINE;
    if (size >= LARGE) {
        header *old = atomic_exchange(&kept, NULL);
        if (old && old->size >= size) return (char *)old + LINE;
        free(old);
    }
    if (posix_memalign(&memory, size < LARGE ? LINE : HUGE_PAGE, size)) return NULL;
#ifdef MADV_HUGEPAGE
    if (size >= HUGE_PAGE) madvise(memory, size / HUGE_PAGE * HUGE_PAGE, MADV_HUGEPAGE);
#endif
    ((header *)memory)->size = size;
    return (char *)memory + LINE;
}

void mk_release_memory(void *memory) {
    if (!memory) return;
    header *of = (header *)(void *)((char *)memory - LINE);
    free(of->size < LARGE || of->size > KEPT ? of : atomic_exchange(&kept, of));
}
