// The sparse products for AVX2 and FMA; setup.py gives this file its flags.
#define FASTPEFT_ISA avx2
#define FASTPEFT_LANES 8
#include "body.h"
