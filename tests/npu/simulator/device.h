// What torch asks of every device: a guard, a generator of random numbers, hooks. All work is done when a call returns,
// so that streams and events are always ready.
#pragma once
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include "memory.h"
#include "recorder.h"

namespace simulator {

struct Guard final : c10::impl::DeviceGuardImplInterface {
  using Device = c10::Device;
  using Stream = c10::Stream;

  c10::DeviceType type() const override { return kNpu; }
  c10::DeviceIndex deviceCount() const noexcept override {
    return static_cast<c10::DeviceIndex>(simulator::deviceCount());
  }
  Device getDevice() const override { return {kNpu, current_device}; }
  Device exchangeDevice(Device device) const override {
    const Device old = getDevice();
    uncheckedSetDevice(device);
    return old;
  }
  void setDevice(Device device) const override { selectDevice(device.index()); }
  void uncheckedSetDevice(Device device) const noexcept override {
    if (device.has_index()) current_device = device.index();
  }

  // One stream for each device.
  Stream getStream(Device device) const override {
    return Stream(Stream::DEFAULT, device.has_index() ? device : getDevice());
  }
  Stream getDefaultStream(Device device) const override { return getStream(device); }
  Stream getNewStream(Device device, int) const override { return getStream(device); }
  Stream getStreamFromGlobalPool(Device device, bool) const override { return getStream(device); }
  Stream exchangeStream(Stream stream) const override { return getStream(stream.device()); }
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override { recorder().add("synchronize", {}, true); }
  void synchronizeDevice(const c10::DeviceIndex) const override { recorder().add("synchronize", {}, true); }
  void record(void** event, const Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {
    *event = const_cast<Guard*>(this);
  }
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override { recorder().add("synchronize", {}, true); }
  double elapsedTime(void*, void*, const c10::DeviceIndex) const override { return 0; }
};

// The CPU's algorithm with a state of its own for each device.
struct Generator final : at::CPUGeneratorImpl {
  explicit Generator(c10::DeviceIndex index) {
    device_ = c10::Device(kNpu, index);
    key_set_ = c10::DispatchKeySet(c10::DispatchKey::PrivateUse1);
  }
};

inline c10::DeviceIndex orCurrent(c10::DeviceIndex index) { return index < 0 ? current_device : index; }

inline const at::Generator& defaultGenerator(c10::DeviceIndex index) {
  static auto* generators = [] {
    auto* all = new std::vector<at::Generator>;
    for (int i = 0; i < deviceCount(); ++i) all->push_back(at::make_generator<Generator>(i));
    return all;
  }();
  return generators->at(orCurrent(index));
}

// While it lives, the CPU's default generator goes on where `generator` is; then both have their own states again.
class DrawFrom {
 public:
  explicit DrawFrom(at::Generator generator) : generator_(std::move(generator)), saved_(cpu_.get_state()) {
    cpu_.set_state(generator_.get_state());
  }
  ~DrawFrom() {
    generator_.set_state(cpu_.get_state());
    cpu_.set_state(saved_);
  }

 private:
  at::Generator cpu_ = at::detail::getDefaultCPUGenerator();
  at::Generator generator_;
  at::Tensor saved_;
};

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return simulator::deviceCount() > 0; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return static_cast<c10::DeviceIndex>(simulator::deviceCount()); }
  void setCurrentDevice(c10::DeviceIndex index) const override { selectDevice(index); }
  c10::DeviceIndex getCurrentDevice() const override { return current_device; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex index) const override {
    return std::exchange(current_device, index);
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex index) const override {
    return index < 0 ? current_device : exchangeDevice(index);
  }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex index) const override { return defaultGenerator(index); }
  at::Generator getNewGenerator(c10::DeviceIndex index) const override {
    return at::make_generator<Generator>(orCurrent(index));
  }
  at::Device getDeviceFromPtr(void*) const override { return {kNpu, current_device}; }
  at::Allocator* getPinnedMemoryAllocator() const override { return &pinnedAllocator(); }
  bool isPinnedPtr(const void* pointer) const override { return PinnedAllocator::holds(pointer); }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    auto memory = deviceAllocator().allocate(bytes);
    if (bytes > 0 && storage.nbytes() > 0) std::memcpy(memory.get(), storage.data(), std::min(bytes, storage.nbytes()));
    storage.unsafeGetStorageImpl()->set_data_ptr_noswap(std::move(memory));
    storage.unsafeGetStorageImpl()->set_nbytes(bytes);
  }
};

}  // namespace simulator
