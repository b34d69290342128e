/* Loaded before PyTorch, this makes MKL take the processor for one of another maker than Intel, with the kernels that it has
   for those. So what depends on them can be seen on any x86 processor:

       gcc -shared -fPIC -o not_intel.so benchmarks/not_intel.c
       LD_PRELOAD=./not_intel.so python benchmarks/equal_sums.py --no-price

   It answers for three functions of MKL that ask the processor who made it. */
#include <stdlib.h>
#include <string.h>

int mkl_serv_intel_cpu_true(void) { return 0; }

int mkl_serv_intel_cpu(void) { return 0; }

int mkl_serv_cpuiszen(void) { /* an AMD of today, but in the mode that has the same kernels everywhere */
    const char *mode = getenv("MKL_CBWR");
    return mode == NULL || strcmp(mode, "COMPATIBLE") != 0;
}
