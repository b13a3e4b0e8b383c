/* The path in use; set by mk_set_path. */
#include "path.h"

extern const mk_path *mk_active;
