/* Memory of calls.  A large piece is kept for the next call and uses huge pages: page faults of new memory took an eighth
 * of the time of a prompt.  A piece larger than KEPT is not kept, because it would add to the arrays that are allocated
 * between calls; its pages are huge, so that their faults cost little. */
#define _GNU_SOURCE
#include <stdatomic.h>
#include <stdlib.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include "memory.h"

enum { LINE = 64, LARGE = 1 << 20, HUGE_PAGE = 1 << 21, KEPT = 32 << 20 };

/* Stored before the memory, in its own cache line. */
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
