// A simulated device "npu" for tests: a PrivateUse1 backend of torch whose memory is the host's and whose arithmetic is
// the CPU's. It shows where tensors live, what is asked of the device and when the host waits for it. It shows nothing
// of Ascend's kernels, their numbers, speed or memory.
#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <torch/library.h>

#include <set>

#include "collectives.h"
#include "device.h"
#include "memory.h"
#include "recorder.h"

namespace simulator {
namespace {

using at::Tensor;

REGISTER_ALLOCATOR(kNpu, &deviceAllocator());
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);
[[maybe_unused]] const bool hooked = [] {
  at::RegisterPrivateUse1HooksInterface(new Hooks);
  return true;
}();

// ---- memory ----
const c10::DispatchKeySet kKeys(c10::DispatchKey::PrivateUse1);

Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
             std::optional<at::Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  const c10::OptionalDeviceGuard guard(device);
  return at::detail::empty_generic(size, &deviceAllocator(), kKeys, c10::dtype_or_default(dtype), format);
}

Tensor emptyStrided(at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                    std::optional<at::Layout>, std::optional<at::Device> device, std::optional<bool>) {
  const c10::OptionalDeviceGuard guard(device);
  return at::detail::empty_strided_generic(size, stride, &deviceAllocator(), kKeys, c10::dtype_or_default(dtype));
}

const Tensor& resize(const Tensor& self, at::IntArrayRef size, std::optional<at::MemoryFormat> format) {
  const c10::DeviceGuard guard(self.device());
  auto* implementation = self.unsafeGetTensorImpl();
  implementation->set_sizes_contiguous(size);
  if (format && *format != at::MemoryFormat::Preserve) implementation->empty_tensor_restride(*format);
  const size_t bytes = at::detail::computeStorageNbytes(self.sizes(), self.strides(), self.dtype().itemsize(),
                                                        self.storage_offset());
  if (self.storage().nbytes() < bytes) Hooks().resizePrivateUse1Bytes(self.storage(), bytes);
  return self;
}

Tensor copyFrom(const Tensor& source, const Tensor& target, bool non_blocking) {
  if (source.device().is_cpu()) {
    // A device waits for nothing here, but the host waits for all that was launched before: torch and torch_npu both copy
    // by themselves only if asked to, and out of pinned memory.
    recorder().add("copy_from_host", {target}, !(non_blocking && PinnedAllocator::holds(source.data_ptr())));
  } else if (target.device().is_cpu()) {
    // Only into pinned memory, and only if asked to, does the host not wait.
    recorder().add("copy_to_host", {source}, !(non_blocking && PinnedAllocator::holds(target.data_ptr())));
  } else {
    recorder().add("copy_", {source, target});
  }
  onHost(target).copy_(onHost(source));
  return target;
}

Tensor copyFromAndResize(const Tensor& source, const Tensor& target) {
  at::native::resize_output(target, source.sizes());
  return copyFrom(source, target, false);
}

at::Scalar localScalar(const Tensor& tensor) {
  recorder().add("_local_scalar_dense", {tensor}, true);
  return at::_local_scalar_dense(onHost(tensor));
}

Tensor& setTensor(Tensor& self, const Tensor& source) {
  return at::native::set_storage_cpu_(self, source.storage(), source.storage_offset(), source.sizes(),
                                      source.strides());
}

Tensor& setStorage(Tensor& self, at::Storage storage) {
  const auto elements = static_cast<int64_t>(storage.nbytes() / self.dtype().itemsize());
  return at::native::set_storage_cpu_(self, std::move(storage), 0, elements, {});
}

Tensor& setStorageOffset(Tensor& self, at::Storage storage, int64_t offset, at::IntArrayRef size,
                         at::IntArrayRef stride) {
  return at::native::set_storage_cpu_(self, std::move(storage), offset, size, stride);
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("empty.memory_format", &empty);
  library.impl("empty_strided", &emptyStrided);
  library.impl("resize_", &resize);
  library.impl("_copy_from", &copyFrom);
  library.impl("_copy_from_and_resize", &copyFromAndResize);
  library.impl("_local_scalar_dense", &localScalar);
  library.impl("as_strided", &at::native::as_strided_tensorimpl);
  library.impl("view", &at::native::view);
  library.impl("_reshape_alias", &at::native::_reshape_alias);
  library.impl("unfold", &at::native::unfold);
  library.impl("set_.source_Tensor", &setTensor);
  library.impl("set_.source_Storage", &setStorage);
  library.impl("set_.source_Storage_storage_offset", &setStorageOffset);
  // Without this, module.to("npu") makes new parameters, and tied weights are tied no more.
  library.impl("_has_compatible_shallow_copy_type",
               [](const Tensor&, const Tensor& from) { return from.layout() == at::kStrided; });
}

// ---- arithmetic ----
bool isList(const c10::IValue& value) { return value.isTensorList() || value.isList(); }

// The device that an operator runs on: that of its npu tensors. Raises if they are on several, or if one is on the CPU,
// where a real device raises too. Exempt are the indices of `index` and its kin, and numbers: tensors without
// dimensions that are arguments of their own, not elements of a list.
std::optional<c10::Device> commonDevice(const c10::OperatorHandle& op, const torch::jit::Stack& stack) {
  static const std::set<std::string> takes_host_indices = {"aten::index", "aten::index_put_", "aten::_index_put_impl_"};
  const std::string& name = op.schema().name();
  std::optional<c10::Device> device;
  for (size_t i = stack.size() - op.schema().arguments().size(); i < stack.size(); ++i) {
    if (isList(stack[i]) && takes_host_indices.count(name)) continue;
    if (stack[i].isDevice() && !device) device = stack[i].toDevice();
    Tensors tensors;
    if (stack[i].isTensor() && stack[i].toTensor().defined() &&
        (stack[i].toTensor().dim() > 0 || stack[i].toTensor().device().is_privateuseone())) {
      tensors = {stack[i].toTensor()};
    } else if (stack[i].isTensorList()) {
      tensors = stack[i].toTensorVector();
    }
    for (const auto& tensor : tensors) {
      if (!device) device = tensor.device();
      TORCH_CHECK(tensor.device() == *device, name, ": expected all tensors to be on one device, found ", *device,
                  " and ", tensor.device());
    }
  }
  return device;
}

// Runs any operator on the CPU and brings the results back. Random numbers come from the device's own generator.
void run(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto device = commonDevice(op, *stack);
  const c10::OptionalDeviceGuard guard(device && device->is_privateuseone() ? device : std::nullopt);
  if (recorder().on()) {
    const auto& schema = op.schema();
    const std::string overload = schema.overload_name().empty() ? "" : "." + schema.overload_name();
    bool host_waits = false;  // for what is no tensor
    for (const auto& result : schema.returns()) {
      const auto& type = *result.type();
      host_waits |= type.kind() == c10::TypeKind::BoolType || type.isSubtypeOf(*c10::NumberType::get());
    }
    recorder().add(schema.name().substr(6) + overload, tensorArguments(op, *stack), host_waits);
  }
  const Recorder::Quiet quiet;
  std::optional<DrawFrom> draw;
  if (op.hasTag(at::Tag::nondeterministic_seeded)) {
    at::Generator generator = defaultGenerator(-1);
    for (size_t i = stack->size() - op.schema().arguments().size(); i < stack->size(); ++i) {
      c10::IValue& value = (*stack)[i];
      if (!value.isGenerator()) continue;
      TORCH_CHECK(value.toGenerator().device().is_privateuseone(), "expected an npu generator, found one on ",
                  value.toGenerator().device());
      generator = value.toGenerator();
      value = c10::IValue();
    }
    draw.emplace(generator);
  }
  at::native::cpu_fallback(op, stack, /*error_on_views=*/true);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) { library.fallback(torch::CppFunction::makeFromBoxedFunction<&run>()); }

// Whether one kernel can stand for the operator as a whole. Copies, views and what makes tensors from nothing are left
// to the functions above; what only decomposes has no autograd of its own.
bool canBeNative(const c10::OperatorHandle& op) {
  const auto& schema = op.schema();
  if (op.hasKernelForDispatchKey(c10::DispatchKey::PrivateUse1) ||
      op.hasKernelForDispatchKey(c10::DispatchKey::CompositeImplicitAutograd)) {
    return false;
  }
  if (schema.name() == "aten::copy_" || schema.name() == "aten::clone") return false;
  for (const auto& argument : schema.arguments()) {
    if (argument.name() == "device") return false;
  }
  for (const auto& result : schema.returns()) {
    if (result.alias_info() != nullptr && !result.alias_info()->isWrite()) return false;
  }
  return true;
}

// Gives the device kernels of its own for these operators ("add.Tensor"), so that they reach it whole where torch would
// take them apart. Returns how many were given one.
int makeNative(const std::vector<std::string>& names) {
  static auto* library =
      new torch::Library(torch::Library::IMPL, "aten", c10::DispatchKey::PrivateUse1, __FILE__, __LINE__);
  int count = 0;
  for (const auto& name : names) {
    const auto dot = name.find('.');
    const auto op = c10::Dispatcher::singleton().findSchema(
        {"aten::" + name.substr(0, dot), dot == std::string::npos ? "" : name.substr(dot + 1)});
    if (!op || !canBeNative(*op)) continue;
    library->impl(name.c_str(), torch::CppFunction::makeFromBoxedFunction<&run>());
    ++count;
  }
  return count;
}

// ---- autocast: torch's own lists of operators ----
TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, library) { library.fallback(torch::CppFunction::makeFallthrough()); }
TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
#define LOWER_PRECISION(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, lower_precision_fp)
#define FLOAT32(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32)
#define FLOAT32_BY_ARGUMENT(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32_set_opt_dtype)
#define WIDEST(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, promote)
  AT_FORALL_LOWER_PRECISION_FP(LOWER_PRECISION)
  AT_FORALL_FP32(FLOAT32)
  AT_FORALL_FP32_SET_OPT_DTYPE(FLOAT32_BY_ARGUMENT)
  AT_FORALL_PROMOTE(WIDEST)
}

}  // namespace
}  // namespace simulator

PYBIND11_MODULE(npu_simulator, m) {
  using namespace simulator;
  namespace py = pybind11;
  m.def("device_count", &deviceCount);
  m.def("current_device", [] { return int(current_device); });
  m.def("set_device", [](int index) { selectDevice(static_cast<c10::DeviceIndex>(index)); });
  m.def("default_generator", [](int index) { return defaultGenerator(static_cast<c10::DeviceIndex>(index)); });
  m.def("memory_allocated", [](int index) { return usage(index).now.load(); });
  m.def("max_memory_allocated", [](int index) { return usage(index).peak.load(); });
  m.def("reset_peak_memory_stats", [](int index) { usage(index).peak = usage(index).now.load(); });
  m.def("free_memory", [](int index) { return isBusy(index) ? 0 : kTotalBytes - usage(index).now; });
  m.def("total_memory", [] { return kTotalBytes; });
  m.def("make_native", &makeNative);
  m.def("hccl_over", [](c10::intrusive_ptr<c10d::Backend> gloo) {
    return c10::static_intrusive_pointer_cast<c10d::Backend>(c10::make_intrusive<Hccl>(std::move(gloo)));
  });
  py::class_<Request>(m, "Request")
      .def_readonly("phase", &Request::phase)
      .def_readonly("name", &Request::name)
      .def_readonly("tensors", &Request::tensors)
      .def_readonly("place", &Request::place);
  m.def("start_recording", [](const std::string& phase) { recorder().start(phase); });
  m.def("mark", [](const std::string& phase) { recorder().mark(phase); });
  m.def("stop_recording", [] { return recorder().stop(); });
  m.def("set_locator", [](py::function locate) { recorder().setLocator(std::move(locate)); });
}
