// A CUDA device that holds nothing: enough for autograd's engine to run fake tensors of device "cuda" where there is no GPU.
//
// 1. A device guard that does nothing, as c10's own NoOpDeviceGuardImpl (which only CUDA builds install by themselves).
// 2. CUDA hooks that answer "there is one device, the current one is 0", so that at::getAccelerator() is CUDA.
//
// The hooks are registered with preference, so that they also win over those of a CUDA build whose GPU is hidden or absent.
// The library must be loaded before torch asks for its hooks, that is before `import torch`.
#include <ATen/Context.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/util/Registry.h>

namespace {

using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;
using c10::EventFlag;
using c10::Stream;

struct NoOpGuard final : c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return DeviceType::CUDA; }
  Device exchangeDevice(Device) const override { return Device(DeviceType::CUDA, 0); }
  Device getDevice() const override { return Device(DeviceType::CUDA, 0); }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  Stream getStream(Device) const noexcept override { return stream(); }
  Stream getNewStream(Device, int) const override { return stream(); }
  Stream exchangeStream(Stream) const noexcept override { return stream(); }
  DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const Stream&, const DeviceIndex, const EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}

 private:
  static Stream stream() noexcept { return Stream(Stream::DEFAULT, Device(DeviceType::CUDA, 0)); }
};

NoOpGuard guard;

}  // namespace

namespace hpc_core {

struct FakeCudaHooks final : at::CUDAHooksInterface {
  explicit FakeCudaHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  int getNumGPUs() const override { return 1; }
  DeviceIndex current_device() const override { return 0; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(DeviceIndex) const override {}
  DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
  void deviceSynchronize(DeviceIndex) const override {}
};

}  // namespace hpc_core

namespace at {
using hpc_core::FakeCudaHooks;
// The key is the one that torch asks for.
C10_REGISTER_CLASS_WITH_PRIORITY(CUDAHooksRegistry, CUDAHooks, c10::REGISTRY_PREFERRED, FakeCudaHooks)
}  // namespace at

// After `import torch`: a CUDA build has registered its own guard meanwhile, which would ask the driver.
extern "C" __attribute__((visibility("default"))) void hpc_core_install_guard() {
  c10::impl::DeviceGuardImplRegistrar registrar(DeviceType::CUDA, &guard);
}
