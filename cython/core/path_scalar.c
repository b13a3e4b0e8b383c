#include "vec_scalar.h"

#define NAME scalar
#include "body.h"
