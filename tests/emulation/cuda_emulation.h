// Runs CUDA kernels on one thread of a CPU, to test their source where there is no GPU: what csrc/cuda_device.cuh takes
// from the GPU, with faults that a GPU would hide made visible.
//
// Every CUDA thread is a fiber with its own stack, and runs until it waits: at a barrier of the block, or for the rest
// of its warp. A warp runs as far as it can before the next one does. What barriers do not order can happen in any order on
// a GPU; the tests ask for three of them (`order`). Shared memory is filled with NaN for each block
// and has exactly the size given at the launch; an asynchronous copy puts NaN in its place until it is waited for.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __syncthreads() ::emulation::wait(::emulation::Wait::kBlock)
#define threadIdx (::emulation::running().thread)
#define blockIdx (::emulation::block().index)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emulation {

enum class Order { kForward, kReverse, kRandom };
enum class Wait { kNot, kBlock, kWarp, kFinished };

inline Order& order() {
  static Order value = Order::kForward;
  return value;
}

struct Copy {
  void* shared;
  const void* global;
  int bytes;
};

// Collectives are told apart by the function that carries them out, given what the 32 lanes bring.
using Collective = void (*)(const void* const* requests);

struct Fiber {
  dim3 thread;
  Wait wait = Wait::kNot;
  Collective collective = nullptr;  // of the warp, that it waits for
  const void* request = nullptr;    // and what it brings to that
  std::vector<std::vector<Copy>> copies{1};  // groups, the open one last
  std::unique_ptr<std::byte[]> stack;
  void* stack_pointer = nullptr;
};

struct Block {
  dim3 index;
  std::vector<Fiber> fibers;
  std::vector<std::byte> shared;
  std::function<void()> kernel;
  std::exception_ptr error;  // what a fiber threw
  size_t now = 0;
  void* scheduler = nullptr;  // its stack pointer
};

inline Block& block() {
  static Block value;
  return value;
}

inline Fiber& running() { return block().fibers[block().now]; }

constexpr size_t kStackBytes = 1 << 16;

// Stores the stack pointer in *from and goes on at `to`: x86-64's callee-saved registers lie on the stacks.
extern "C" void emulation_switch(void** from, void* to);
asm(R"(
.text
.weak emulation_switch
.type emulation_switch, @function
emulation_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
.size emulation_switch, .-emulation_switch
)");

// Tells AddressSanitizer which stack is in use.
inline void begin_switch([[maybe_unused]] const void* stack, [[maybe_unused]] size_t bytes,
                         [[maybe_unused]] void** fake) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(fake, stack, bytes);
#endif
}

inline void end_switch([[maybe_unused]] void* fake, [[maybe_unused]] const void** stack,
                       [[maybe_unused]] size_t* bytes) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fake, stack, bytes);
#endif
}

struct SchedulerStack {
  const void* bottom = nullptr;
  size_t bytes = 0;
};

inline SchedulerStack& scheduler_stack() {
  static SchedulerStack value;
  return value;
}

// Back to the scheduler, until what the fiber waits for is there.
inline void wait(Wait what) {
  Fiber& fiber = running();
  fiber.wait = what;
  void* fake = nullptr;
  begin_switch(scheduler_stack().bottom, scheduler_stack().bytes, what == Wait::kFinished ? nullptr : &fake);
  emulation_switch(&fiber.stack_pointer, block().scheduler);
  end_switch(fake, &scheduler_stack().bottom, &scheduler_stack().bytes);
}

inline void fiber_main() {
  end_switch(nullptr, &scheduler_stack().bottom, &scheduler_stack().bytes);
  try {
    block().kernel();
  } catch (...) {
    block().error = std::current_exception();
  }
  wait(Wait::kFinished);
}

inline void resume(size_t number) {
  block().now = number;
  Fiber& fiber = running();
  fiber.wait = Wait::kNot;
  void* fake = nullptr;
  begin_switch(fiber.stack.get(), kStackBytes, &fake);
  emulation_switch(&block().scheduler, fiber.stack_pointer);
  end_switch(fake, nullptr, nullptr);
  if (block().error) {
    std::rethrow_exception(std::exchange(block().error, nullptr));
  }
}

inline void prepare(Fiber& fiber, unsigned number) {
  fiber.thread = dim3(number, 0, 0);
  fiber.wait = Wait::kNot;
  fiber.copies.assign(1, {});
  if (!fiber.stack) {
    fiber.stack = std::make_unique_for_overwrite<std::byte[]>(kStackBytes);
  }
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(fiber.stack.get(), kStackBytes);
#endif
  auto top = reinterpret_cast<uintptr_t>(fiber.stack.get() + kStackBytes) / 16 * 16;
  // The six registers that a switch takes from the stack, where it returns to, and the return address of that.
  void** frame = reinterpret_cast<void**>(top) - 8;
  std::memset(frame, 0, 8 * sizeof(void*));
  frame[6] = reinterpret_cast<void*>(&fiber_main);
  fiber.stack_pointer = frame;
}

// Runs a warp to where all its lanes wait; if that is a collective of the warp, carries it out and returns true.
inline bool advance(size_t warp) {
  static std::minstd_rand random(1);
  Block& b = block();
  size_t lanes[32];
  for (size_t i = 0; i < 32; ++i) {
    lanes[i] = 32 * warp + (order() == Order::kReverse ? 31 - i : i);
  }
  if (order() == Order::kRandom) {
    std::shuffle(lanes, lanes + 32, random);
  }
  for (size_t lane : lanes) {
    if (b.fibers[lane].wait == Wait::kNot) {
      resume(lane);
    }
  }
  const void* requests[32];
  for (size_t i = 0; i < 32; ++i) {
    const Fiber& fiber = b.fibers[32 * warp + i];
    if (fiber.wait != Wait::kWarp || fiber.collective != b.fibers[32 * warp].collective) {
      return false;
    }
    requests[i] = fiber.request;
  }
  b.fibers[32 * warp].collective(requests);
  for (size_t lane : lanes) {
    b.fibers[lane].wait = Wait::kNot;
  }
  return true;
}

// Runs the warps, one as far as it comes before the next or in random turns, to where none can go on.
inline void advance_all() {
  static std::minstd_rand random(1);
  std::vector<size_t> warps(block().fibers.size() / 32);
  std::iota(warps.begin(), warps.end(), 0);
  while (!warps.empty()) {
    const size_t last = warps.size() - 1;
    const size_t turn = order() == Order::kForward ? 0 : order() == Order::kReverse ? last : random() % warps.size();
    if (!advance(warps[turn])) {
      warps.erase(warps.begin() + turn);
    }
  }
}

inline void run_block() {
  Block& b = block();
  std::memset(b.shared.data(), 0xff, b.shared.size());  // NaN in float, bf16 and fp16
  for (size_t i = 0; i < b.fibers.size(); ++i) {
    prepare(b.fibers[i], static_cast<unsigned>(i));
  }
  while (true) {
    advance_all();
    const auto are = [&](Wait what) {
      return std::count_if(b.fibers.begin(), b.fibers.end(), [&](const Fiber& fiber) { return fiber.wait == what; });
    };
    const auto threads = static_cast<std::ptrdiff_t>(b.fibers.size());
    if (are(Wait::kFinished) == threads) {
      return;
    }
    if (are(Wait::kBlock) < threads) {
      throw std::runtime_error("emulation: " + std::to_string(are(Wait::kBlock)) + " of " + std::to_string(threads) +
                               " threads wait at a barrier to which the others do not come");
    }
    for (Fiber& fiber : b.fibers) {
      fiber.wait = Wait::kNot;
    }
  }
}

template <typename Request>
void join_warp(Collective collective, const Request& request) {
  running().request = &request;
  running().collective = collective;
  wait(Wait::kWarp);
}

}  // namespace emulation

namespace megatron_step {

inline void copy_async(void* shared, const void* global, int bytes) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 || reinterpret_cast<uintptr_t>(global) % 16) {
    throw std::runtime_error("emulation: an asynchronous copy between addresses that are not multiples of 16");
  }
  std::memset(shared, 0xff, 16);
  emulation::running().copies.back().push_back({shared, global, bytes});
}

inline void commit_copies() { emulation::running().copies.emplace_back(); }

template <int PENDING>
void wait_copies() {
  auto& groups = emulation::running().copies;
  while (groups.size() > PENDING + 1) {
    for (const auto& copy : groups.front()) {
      std::memcpy(copy.shared, copy.global, copy.bytes);
      std::memset(static_cast<std::byte*>(copy.shared) + copy.bytes, 0, 16 - copy.bytes);
    }
    groups.erase(groups.begin());
  }
}

struct MatricesRequest {
  uint32_t* words;
  const void* row;
};

template <bool TRANSPOSED>
void load_matrices(uint32_t (&words)[4], const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16) {
    throw std::runtime_error("emulation: a row of a matrix at an address that is not a multiple of 16");
  }
  emulation::join_warp(
      [](const void* const* requests) {
        const auto lane = [&](int l) { return *static_cast<const MatricesRequest*>(requests[l]); };
        for (int l = 0; l < 32; ++l) {
          for (int i = 0; i < 4; ++i) {
            uint16_t pair[2];
            for (int e = 0; e < 2; ++e) {
              const int r = TRANSPOSED ? l % 4 * 2 + e : l / 4, c = TRANSPOSED ? l / 4 : l % 4 * 2 + e;
              std::memcpy(&pair[e], static_cast<const uint16_t*>(lane(8 * i + r).row) + c, 2);
            }
            lane(l).words[i] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
          }
        }
      },
      MatricesRequest{words, row});
}

struct ProductRequest {
  float* c;
  const uint32_t* a;
  uint32_t b[2];
};

template <typename T>
void multiply_matrices(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulation::join_warp(
      [](const void* const* requests) {
        const auto value = [](uint32_t word, int e) {
          return static_cast<float>(T(static_cast<uint16_t>(word >> 16 * e), T::from_bits()));
        };
        float a[16][16], b[16][8];
        for (int l = 0; l < 32; ++l) {
          const auto& lane = *static_cast<const ProductRequest*>(requests[l]);
          for (int i = 0; i < 8; ++i) {
            a[l / 4 + i / 2 % 2 * 8][l % 4 * 2 + i % 2 + i / 4 * 8] = value(lane.a[i / 2], i % 2);
          }
          for (int i = 0; i < 4; ++i) {
            b[l % 4 * 2 + i % 2 + i / 2 * 8][l / 4] = value(lane.b[i / 2], i % 2);
          }
        }
        for (int l = 0; l < 32; ++l) {
          const auto& lane = *static_cast<const ProductRequest*>(requests[l]);
          for (int i = 0; i < 4; ++i) {
            for (int k = 0; k < 16; ++k) {
              lane.c[i] += a[l / 4 + i / 2 * 8][k] * b[k][l % 4 * 2 + i % 2];
            }
          }
        }
      },
      ProductRequest{c, a, {b0, b1}});
}

template <typename T>
T* shared_memory() {
  return reinterpret_cast<T*>(emulation::block().shared.data());
}

template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared_bytes, void*,
            Arguments... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.y > 65535 || threads % 32 || shared_bytes > 227 * 1024) {
    throw std::runtime_error(std::string(name) + ": a launch that every GPU would refuse");
  }
  auto& block = emulation::block();
  block.fibers.resize(threads);
  block.shared = std::vector<std::byte>(shared_bytes);
  block.kernel = [&] { kernel(arguments...); };
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; ++x) {
      block.index = dim3(x, y);
      emulation::run_block();
    }
  }
}

}  // namespace megatron_step
