/* Memory of calls. */
#ifndef MK_MEMORY_H
#define MK_MEMORY_H

#include <stddef.h>

/* So many bytes from the begin of a cache line on, or NULL.  The last piece of 1 to 32 MiB that was released is
 * kept for the next call that takes one. */
void *mk_take_memory(size_t size);
void mk_release_memory(void *memory);

#endif
