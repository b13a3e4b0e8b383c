#include "path.h"

#ifdef MK_ARM
#ifdef __clang__ /* gcc's arm_neon.h asks for a whole architecture; vec_neon.h tells its assembler instead */
MK_TARGET("dotprod")
#endif
#define VEC_DOT
#include "vec_neon.h"

#define NAME neondot
#define LIKE neon
#include "body.h"
#ifdef __clang__
MK_TARGET_END
#endif
#endif
