#include "path.h"

#ifdef MK_ARM
#include "vec_neon.h"

#define NAME neon
#include "body.h"
#endif
