// The memory of the simulated devices: ordinary host memory that belongs to one of them.
#pragma once
#include <ATen/ATen.h>
#include <c10/core/impl/alloc_cpu.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <map>
#include <mutex>
#include <sstream>
#include <string>
#include <vector>

namespace simulator {

constexpr auto kNpu = c10::DeviceType::PrivateUse1;

inline std::vector<int> numbers(const char* variable) {
  std::vector<int> found;
  const char* value = std::getenv(variable);
  std::stringstream text(value != nullptr ? value : "");
  for (std::string word; std::getline(text, word, ',');) found.push_back(std::atoi(word.c_str()));
  return found;
}

// The physical numbers of the devices that this process sees. As in CANN, they are read once, when first asked for.
//   NPUSIM_DEVICES             how many the machine has (1)
//   ASCEND_RT_VISIBLE_DEVICES  which of them are visible (all); the list ends at the first that does not exist
inline const std::vector<int>& physicalDevices() {
  static const std::vector<int> devices = [] {
    const char* value = std::getenv("NPUSIM_DEVICES");
    const int count = value != nullptr ? std::atoi(value) : 1;
    std::vector<int> visible;
    if (std::getenv("ASCEND_RT_VISIBLE_DEVICES") == nullptr) {
      for (int i = 0; i < count; ++i) visible.push_back(i);
    } else {
      for (int i : numbers("ASCEND_RT_VISIBLE_DEVICES")) {
        if (i < 0 || i >= count) break;
        visible.push_back(i);
      }
    }
    return visible;
  }();
  return devices;
}

inline int deviceCount() { return static_cast<int>(physicalDevices().size()); }

inline thread_local c10::DeviceIndex current_device = 0;

// Raises for a device that does not exist.
inline void selectDevice(c10::DeviceIndex index) {
  TORCH_CHECK(index >= 0 && index < deviceCount(), "npu:", int(index), " does not exist: there are ", deviceCount());
  current_device = index;
}

// A device whose physical number is in NPUSIM_BUSY has no memory left, as when another process holds it all.
inline bool isBusy(c10::DeviceIndex index) {
  static const std::vector<int> busy = numbers("NPUSIM_BUSY");
  return std::find(busy.begin(), busy.end(), physicalDevices().at(index)) != busy.end();
}

constexpr int64_t kTotalBytes = int64_t{64} << 30;

// Bytes that tensors of one device take.
struct Usage {
  std::atomic<int64_t> now{0};
  std::atomic<int64_t> peak{0};

  void add(int64_t bytes) {
    const int64_t sum = now += bytes;
    for (int64_t old = peak; sum > old && !peak.compare_exchange_weak(old, sum);) {
    }
  }
};

inline Usage& usage(c10::DeviceIndex index) {
  static auto* all = new std::vector<Usage>(std::max(deviceCount(), 1));
  return all->at(index);
}

class DeviceAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    const c10::Device device(kNpu, current_device);
    if (bytes == 0) return {nullptr, nullptr, &c10::detail::deleteNothing, device};
    // The message is that of torch_npu's allocator.
    TORCH_CHECK(!isBusy(current_device), "NPU out of memory. Tried to allocate ", bytes, " bytes (NPU ",
                int(current_device), "; 64.00 GiB total capacity; 0 bytes already allocated; 0 bytes current active; "
                "0 bytes free; 0 bytes reserved in total by PyTorch) If reserved memory is >> allocated memory try "
                "setting max_split_size_mb to avoid fragmentation.");
    auto* block = new Block{c10::alloc_cpu(bytes), bytes, current_device};
    usage(current_device).add(static_cast<int64_t>(bytes));
    return {block->memory, block, &release, device};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }

 private:
  struct Block {
    void* memory;
    size_t bytes;
    c10::DeviceIndex device;
  };
  static void release(void* context) {
    auto* block = static_cast<Block*>(context);
    usage(block->device).add(-static_cast<int64_t>(block->bytes));
    c10::free_cpu(block->memory);
    delete block;
  }
};

inline DeviceAllocator& deviceAllocator() {
  static DeviceAllocator allocator;
  return allocator;
}

// Page-locked host memory, from which a device copies while the host goes on: here host memory that is remembered.
class PinnedAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    bytes = std::max<size_t>(bytes, 1);
    void* memory = c10::alloc_cpu(bytes);
    std::lock_guard<std::mutex> lock(mutex());
    sizes()[static_cast<const char*>(memory)] = bytes;
    return {memory, memory, &release, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }

  static bool holds(const void* pointer) {
    std::lock_guard<std::mutex> lock(mutex());
    const auto* address = static_cast<const char*>(pointer);
    auto next = sizes().upper_bound(address);
    if (next == sizes().begin()) return false;
    const auto& [start, bytes] = *std::prev(next);
    return address < start + bytes;
  }

 private:
  static void release(void* memory) {
    std::lock_guard<std::mutex> lock(mutex());
    sizes().erase(static_cast<const char*>(memory));
    c10::free_cpu(memory);
  }
  // Never destroyed: tensors may outlive statics.
  static std::mutex& mutex() {
    static auto* instance = new std::mutex;
    return *instance;
  }
  static std::map<const char*, size_t>& sizes() {
    static auto* instance = new std::map<const char*, size_t>;
    return *instance;
  }
};

inline PinnedAllocator& pinnedAllocator() {
  static PinnedAllocator allocator;
  return allocator;
}

// The same bytes as a CPU tensor; `tensor` lives as long as it does.
inline at::Tensor onHost(const at::Tensor& tensor) {
  if (!tensor.device().is_privateuseone()) return tensor;
  const auto options = tensor.options().device(at::kCPU);
  if (tensor.numel() == 0) return at::empty_strided(tensor.sizes(), tensor.strides(), options);
  return at::from_blob(tensor.data_ptr(), tensor.sizes(), tensor.strides(), [tensor](void*) {}, options);
}

}  // namespace simulator
