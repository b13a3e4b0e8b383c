#include "path.h"

#ifdef MK_ARM
MK_TARGET("arch=armv8.2-a+dotprod")
#define VEC_DOT
#include "vec_neon.h"

#define NAME neondot
#include "body.h"
MK_TARGET_END
#endif
