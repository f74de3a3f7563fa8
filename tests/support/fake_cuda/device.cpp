// A CUDA device for a CPU build of torch that has no memory and runs nothing.
//
// The autograd engine, pinned memory and streams ask libtorch for a device guard, CUDA hooks and a
// host allocator. These are the smallest ones that satisfy it. The library must be loaded before
// torch is imported, because torch looks up the hooks once, on import.

#include <ATen/core/CachingHostAllocator.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <map>
#include <mutex>

namespace {

using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;
using c10::Stream;

thread_local c10::StreamId current_stream = 0;
std::atomic<c10::StreamId> last_stream{0};

std::mutex pinned_mutex;
std::map<const char*, size_t> pinned;

void free_pinned(void* data) {
  {
    std::lock_guard<std::mutex> lock(pinned_mutex);
    pinned.erase(static_cast<const char*>(data));
  }
  std::free(data);
}

bool is_pinned(const void* data) {
  std::lock_guard<std::mutex> lock(pinned_mutex);
  auto after = pinned.upper_bound(static_cast<const char*>(data));
  if (after == pinned.begin()) {
    return false;
  }
  --after;
  return static_cast<const char*>(data) < after->first + after->second;
}

// Ordinary host memory whose addresses are remembered as page-locked.
struct PinnedAllocator final : at::HostAllocator {
  c10::DataPtr allocate(size_t size) override {
    const size_t page = 4096;
    void* data = std::aligned_alloc(page, (std::max<size_t>(size, 1) + page - 1) / page * page);
    TORCH_CHECK(data != nullptr, "out of host memory");
    std::lock_guard<std::mutex> lock(pinned_mutex);
    pinned[static_cast<const char*>(data)] = size;
    return {data, data, &free_pinned, DeviceType::CPU};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free_pinned; }
  void copy_data(void* to, const void* from, size_t count) const override {
    default_copy_data(to, from, count);
  }
  bool record_event(void*, void*, Stream) override { return true; }
  void empty_cache() override {}
  at::HostStats get_stats() override { return {}; }
  void reset_accumulated_stats() override {}
  void reset_peak_stats() override {}
};

PinnedAllocator pinned_allocator;

// One device whose current stream is a number of the calling thread.
struct Guard final : c10::impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  Device exchangeDevice(Device) const override { return getDevice(); }
  Device getDevice() const override { return Device(DeviceType::CUDA, 0); }
  Stream getStream(Device) const noexcept override {
    return Stream(Stream::UNSAFE, Device(DeviceType::CUDA, 0), current_stream);
  }
  Stream getNewStream(Device, int = 0) const override {
    return Stream(Stream::UNSAFE, Device(DeviceType::CUDA, 0), ++last_stream);
  }
  Stream exchangeStream(Stream stream) const noexcept override {
    Stream before = getStream(stream.device());
    current_stream = stream.id();
    return before;
  }
  void record(void**, const Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
};

c10::impl::DeviceGuardImplRegistrar guard(DeviceType::CUDA, new Guard());

} // namespace

namespace at {

// The name is the key under which torch looks the hooks up.
struct CUDAHooks final : CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  int getNumGPUs() const override { return 1; }
  DeviceIndex current_device() const override { return 0; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(DeviceIndex) const override {}
  DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
  Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }
  bool isPinnedPtr(const void* data) const override { return is_pinned(data); }
};

REGISTER_CUDA_HOOKS(CUDAHooks);

} // namespace at

extern "C" {

// Like cudaHostRegister and cudaHostUnregister, for whole allocations: 0, or an error of CUDA.
int fake_cuda_host_register(const char* data, size_t size) {
  std::lock_guard<std::mutex> lock(pinned_mutex);
  const bool is_new = pinned.emplace(data, size).second;
  return is_new ? 0 : 712; // cudaErrorHostMemoryAlreadyRegistered
}

int fake_cuda_host_unregister(const char* data) {
  std::lock_guard<std::mutex> lock(pinned_mutex);
  return pinned.erase(data) ? 0 : 713; // cudaErrorHostMemoryNotRegistered
}

void fake_cuda_install() { at::setHostAllocator(DeviceType::CUDA, &pinned_allocator); }

bool fake_cuda_is_installed() { return at::detail::getCUDAHooks().hasCUDA(); }

int64_t fake_cuda_current_stream() { return current_stream; }

int64_t fake_cuda_exchange_stream(int64_t stream) {
  const int64_t before = current_stream;
  current_stream = stream;
  return before;
}

} // extern "C"
