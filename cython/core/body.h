/* The kernels, written once over the 16-lane layer that was included before; NAME is the path's. */
#include <math.h>
#include <string.h>

#include "coded.h"
#include "half.h"
#include "super.h"
#include "vec_common.h"

#include "body_scaled.h"

#include "body_quant.h"

#include "body_matmul.h"

#include "body_small.h"

#include "body_recurrent.h"

#include "body_attention.h"

#define ENTRY(operation) .operation = operation,
#define PATH_TABLE(name, product, mixture_of_products, to_tiles) PATH_TABLE_(name, product, mixture_of_products, to_tiles)
#define PATH_TABLE_(path, product, mixture_of_products, to_tiles)                                                  \
    const mk_path mk_##path = {MK_OPERATIONS(ENTRY).name = #path, .matmul = product, .mixture = mixture_of_products, \
                               .to_f16 = to_f16, .to_q8 = to_q8, .bf16_step = BF16_STEP, .tile_rows = to_tiles};
PATH_TABLE(NAME, matmul, mixture, NULL)
