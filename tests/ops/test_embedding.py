import torch

from megatron_step.ops.embedding import embedding, embedding_reference


def test_it_is_the_reference_with_a_gradient_in_the_wider_type():
    torch.manual_seed(0)
    index, results = torch.randint(0, 7, (40, 3)), []  # every row is looked up several times
    for operation in (embedding, embedding_reference):
        weight = torch.randn(9, 4, generator=torch.Generator().manual_seed(1)).bfloat16().requires_grad_()
        weight.grad_dtype = torch.float32
        wide = weight if operation is embedding else weight.detach().float().requires_grad_()
        y = operation(index, wide, torch.float32)
        y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(2)))
        results.append((y.detach(), wide.grad))
    (y, gradient), (expected, expected_gradient) = results
    assert y.dtype == gradient.dtype == torch.float32
    assert torch.equal(y, expected)
    torch.testing.assert_close(gradient, expected_gradient)
    assert gradient[7:].eq(0).all()
