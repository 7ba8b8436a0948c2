// Stored weights for AVX2; setup.py gives this file its flags.
#define FASTPEFT_ISA avx2
#define FASTPEFT_LANES 8
#include "body.h"
