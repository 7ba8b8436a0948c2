// Stored weights for AVX-512 (F, BW, VL, DQ); setup.py gives this file its flags.
#define FASTPEFT_ISA avx512
#define FASTPEFT_LANES 16
#include "body.h"
