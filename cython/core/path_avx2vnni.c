#include "path.h"

#ifdef MK_X86
MK_TARGET("avx2,fma,f16c,avxvnni")
#define VEC_VNNI
#include "vec_avx2.h"

#define NAME avx2vnni
#define LIKE avx2
#include "body.h"
MK_TARGET_END
#endif
