/* The path in use; set by mk_set_path. */
#include "path.h"

extern const mk_path *mk_active;

/* Whether this processor converts F16 to floats beside its fma: those of Intel convert on the same ports. */
int mk_f16_is_free(void);
