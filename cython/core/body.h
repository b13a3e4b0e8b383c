/* The kernels, written once over the 16-lane layer that was included before; NAME is the path's. */
#include <math.h>
#include <string.h>

#include "half.h"
#include "super.h"
#include "vec_common.h"

#include "body_quant.h"

#include "body_matmul.h"

#include "body_small.h"

#include "body_attention.h"

#define PATH_TABLE(name, matmul, mixture, tile_rows) PATH_TABLE_(name, matmul, mixture, tile_rows)
#define PATH_TABLE_(name, matmul, mixture, tile_rows)                                                           \
    const mk_path mk_##name = {#name, quantize, dequantize, quantize_rows, matmul, mixture, fold, square_sums,        \
                               rms_norm, layer_norm, rope, rope_interleaved, activate, softcap, softmax, top_k,       \
                               lse_parts, attention, to_f16, to_q8, BF16_STEP, tile_rows};
PATH_TABLE(NAME, matmul, mixture, NULL)
