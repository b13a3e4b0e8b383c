#include "path.h"

#ifdef MK_X86
MK_TARGET("avx")

#include "vec_avx.h"

#define NAME avx
#include "body.h"
MK_TARGET_END
#endif
