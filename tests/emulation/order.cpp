// Sets the order in which the emulation runs a block's threads, for tests: 0 forward, 1 reverse, 2 random.
#include "cuda_emulation.h"

extern "C" void set_order(int order) { emulation::order() = static_cast<emulation::Order>(order); }
