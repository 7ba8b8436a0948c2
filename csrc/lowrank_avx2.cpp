// The low-rank products for AVX2 and FMA; setup.py gives this file its flags.
#define FASTPEFT_ISA avx2
#define FASTPEFT_LANES 8
#include "lowrank_body.h"
