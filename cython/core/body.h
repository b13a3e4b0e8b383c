/* The kernels, written once over the 16-lane vector layer that the path includes first; NAME is the name of the path.  A
 * path that differs from another one only in its products of bytes or of BF16 names it as LIKE and uses its other kernels. */
#include <math.h>
#include <string.h>

#include "active.h"
#include "coded.h"
#include "half.h"
#include "super.h"
#include "vec_common.h"

#define OF(path, name) OF_(path, name)
#define OF_(path, name) mk_##path##_##name

#include "body_scaled.h"

#include "body_matmul.h"

#include "body_scores.h"

#ifdef LIKE
extern const mk_operations OF(LIKE, of_rows);
#else
#define LIKE NAME
#include "body_quant.h"

#include "body_small.h"

#include "body_top_k.h"

#include "body_recurrent.h"

#include "body_attention.h"

#define ENTRY(operation) .operation = operation,
extern const mk_operations OF(NAME, of_rows);
const mk_operations OF(NAME, of_rows) = {MK_OPERATIONS(ENTRY).to_f16 = to_f16, .to_q8 = to_q8};
#endif

#define PATH_TABLE(name, product, mixture_of_products, to_tiles) PATH_TABLE_(name, product, mixture_of_products, to_tiles)
#define PATH_TABLE_(path, product, mixture_of_products, to_tiles)                                             \
    const mk_path mk_##path = {.name = #path, .of_rows = &OF(LIKE, of_rows), .matmul = product,               \
                               .mixture = mixture_of_products, .int8_scores = INT8_SCORES_OF_SHAPES,          \
                               .bf16_step = BF16_STEP, .tile_rows = to_tiles};
PATH_TABLE(NAME, matmul, mixture, NULL)
