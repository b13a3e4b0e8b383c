#include "path.h"

#ifdef MK_X86
MK_TARGET("avx512f,avx512bw,avx512vl,avx512dq,fma,f16c")

#include "vec_avx512.h"

#define NAME avx512
#include "body.h"
MK_TARGET_END
#endif
