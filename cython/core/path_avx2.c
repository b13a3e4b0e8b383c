#include "path.h"

#ifdef MK_X86
MK_TARGET("avx2,fma,f16c")

#include "vec_avx2.h"

#define NAME avx2
#include "body.h"
MK_TARGET_END
#endif
