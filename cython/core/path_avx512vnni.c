#include "path.h"

#ifdef MK_X86
MK_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma,f16c")
#define VEC_VNNI
#include "vec_avx512.h"

#define NAME avx512vnni
#define LIKE avx512
#include "body.h"

#ifdef MK_AMX
#include "body_amx.h"
PATH_TABLE(amx, amx_matmul, amx_mixture, tile_rows)
#endif
MK_TARGET_END
#endif
