#include "path.h"

#ifdef MK_ARM
#ifdef __clang__ /* gcc's arm_neon.h asks for a whole architecture; vec_neon.h tells its assembler instead */
MK_TARGET("dotprod,i8mm")
#endif
#define VEC_DOT
#define VEC_I8MM
#include "vec_neon.h"

#define NAME neoni8mm
#define LIKE neon
#include "body.h"
#ifdef __clang__
MK_TARGET_END
#endif
#endif
