/* Memory of calls. */
#ifndef MK_MEMORY_H
#define MK_MEMORY_H

#include <stddef.h>

/* Returns memory aligned to a cache line, or NULL.  The last released piece of 1 to 32 MiB is kept for the next call that
 * takes such a piece. */
void *mk_take_memory(size_t size);
void mk_release_memory(void *memory);

#endif
