-- Management: profiles, deletion, suspension, roles, plans, refunds and adjustments. p jsonb in, outcome out, as with keys.

-- p: user_id, changes {username, email, preferences, settings}. Outcomes: updated, username_taken, email_taken, not_found.
create function public.update_profile(p jsonb) returns jsonb language plpgsql set search_path = '' as $$
declare
    v_user public.users := public.lock_target(p);
    v_constraint text;
begin
    if v_user.id is null then
        return jsonb_build_object('outcome', 'not_found');
    end if;
    v_user := jsonb_populate_record(v_user, p -> 'changes');
    if octet_length(v_user.preferences::text) > 16384 or octet_length(v_user.settings::text) > 16384 then
        return jsonb_build_object('outcome', 'too_large'); -- the row is read and written by every request of this user
    end if;
    begin
        update public.users set username = v_user.username, email = v_user.email, preferences = v_user.preferences,
            settings = v_user.settings, updated_at = clock_timestamp()
        where id = v_user.id;
    exception when unique_violation then
        get stacked diagnostics v_constraint = constraint_name;
        return jsonb_build_object('outcome', case v_constraint when 'users_email_key' then 'email_taken' else 'username_taken' end);
    end;
    perform public.write_audit(p ->> 'actor', 'update_profile', 'user:' || v_user.id, v_user.id, null, p ->> 'address', p ->> 'user_agent',
        (p ->> 'request_id')::uuid, jsonb_build_object('fields', (select jsonb_agg(f) from jsonb_object_keys(p -> 'changes') f)));
    return jsonb_build_object('outcome', 'updated');
end $$;
revoke all on function public.update_profile(jsonb) from public, anon, authenticated;
grant execute on function public.update_profile(jsonb) to service_role;

create function public.expire_unheld(p_user_id bigint, p_reason text) returns void language plpgsql set search_path = '' as $$
declare
    v_unheld bigint;
begin
    select credits_nanos - held_nanos into v_unheld from public.users where id = p_user_id;
    if v_unheld > 0 then
        perform public.change_credits(p_user_id, 'expiry', -v_unheld, 'gateway', p_reason, null, null);
    end if;
end $$;
revoke all on function public.expire_unheld(bigint, text) from public, anon, authenticated;
grant execute on function public.expire_unheld(bigint, text) to service_role;

-- p: user_id. Keys die at once, running requests settle, what is left of the credits leaves; the books stay. Outcomes: deleted, not_found.
create function public.delete_account(p jsonb) returns jsonb language plpgsql set search_path = '' as $$
declare
    v_user public.users := public.lock_target(p);
begin
    if v_user.id is null then
        return jsonb_build_object('outcome', 'not_found');
    end if;
    update public.api_keys_new set is_active = false, is_primary = false, revoked_at = clock_timestamp(), encrypted_key = null,
        previous_key_hash = null, previous_hash_secret_id = null, previous_valid_until = null
    where user_id = v_user.id and revoked_at is null;
    update public.api_keys set is_active = false where user_id = v_user.id;
    update public.user_plans set is_active = false where user_id = v_user.id and is_active;
    perform public.expire_unheld(v_user.id, 'account deleted');
    update public.users set username = 'deleted-' || v_user.id, email = 'deleted-' || v_user.id, preferences = '{}', settings = '{}',
        is_active = false, deleted_at = clock_timestamp(), updated_at = clock_timestamp()
    where id = v_user.id;
    perform public.write_audit(p ->> 'actor', 'delete', 'user:' || v_user.id, v_user.id, null, p ->> 'address', p ->> 'user_agent',
                               (p ->> 'request_id')::uuid, null);
    return jsonb_build_object('outcome', 'deleted', 'user_id', v_user.id);
end $$;
revoke all on function public.delete_account(jsonb) from public, anon, authenticated;
grant execute on function public.delete_account(jsonb) to service_role;

-- What running requests still held of a deleted account leaves as they are settled.
create function public.expire_rest_of_deleted() returns trigger language plpgsql set search_path = '' as $$
begin
    perform public.expire_unheld(new.id, 'account deleted');
    return null;
end $$;
revoke all on function public.expire_rest_of_deleted() from public, anon, authenticated;
grant execute on function public.expire_rest_of_deleted() to service_role;
create trigger users_deleted_keep_nothing after update of held_nanos on public.users
    for each row when (new.deleted_at is not null and new.credits_nanos > new.held_nanos)
    execute function public.expire_rest_of_deleted();

-- p: user_id, changes {is_active, role}. Outcomes: set, not_found.
create function public.set_user(p jsonb) returns jsonb language plpgsql set search_path = '' as $$
declare
    v_user public.users := public.lock_target(p);
begin
    if v_user.id is null then
        return jsonb_build_object('outcome', 'not_found');
    end if;
    v_user := jsonb_populate_record(v_user, p -> 'changes');
    update public.users set is_active = v_user.is_active, role = v_user.role, updated_at = clock_timestamp() where id = v_user.id;
    perform public.write_audit(p ->> 'actor', 'set_user', 'user:' || v_user.id, v_user.id, null, p ->> 'address', p ->> 'user_agent',
                               (p ->> 'request_id')::uuid, p -> 'changes');
    return jsonb_build_object('outcome', 'set', 'user_id', v_user.id);
end $$;
revoke all on function public.set_user(jsonb) from public, anon, authenticated;
grant execute on function public.set_user(jsonb) to service_role;

-- p: user_id. Outcomes: cancelled, no_plan.
create function public.cancel_plan(p jsonb) returns jsonb language plpgsql set search_path = '' as $$
declare
    v_user public.users := public.lock_target(p);
    v_plan public.user_plans;
    v_now timestamptz := clock_timestamp();
begin
    update public.user_plans set is_active = false, end_date = greatest(least(end_date, v_now), start_date + interval '1 microsecond')
    where user_id = v_user.id and is_active and v_now < end_date returning * into v_plan;
    if not found then
        return jsonb_build_object('outcome', 'no_plan');
    end if;
    update public.users set subscription_status = 'cancelled', updated_at = v_now where id = v_user.id;
    perform public.write_audit(p ->> 'actor', 'cancel_plan', 'user:' || v_user.id, v_user.id, null, p ->> 'address', p ->> 'user_agent',
                               (p ->> 'request_id')::uuid, jsonb_build_object('plan_id', v_plan.plan_id));
    return jsonb_build_object('outcome', 'cancelled', 'plan_id', v_plan.plan_id);
end $$;
revoke all on function public.cancel_plan(jsonb) from public, anon, authenticated;
grant execute on function public.cancel_plan(jsonb) to service_role;

-- What a user may and does use: plan (if any), the limits that apply, counters of today and this month, rate limits and their rings.
create function public.read_limits(p_user_id bigint, p_key_id bigint) returns jsonb language plpgsql stable set search_path = '' as $$
declare
    v_now timestamptz := clock_timestamp();
    v_user public.users;
    v_usage public.rate_limit_usage;
    v_limits public.rate_limit_configs;
begin
    select * into v_user from public.users where id = p_user_id;
    select * into v_usage from public.rate_limit_usage where subject = 'user' and subject_id = p_user_id;
    v_usage := public.advance_usage(v_usage, v_now, null);
    select * into v_limits from public.rate_limit_configs
    where (subject, subject_id) in (('user', p_user_id), ('default', 0)) order by (subject = 'default') limit 1;
    return jsonb_build_object(
        'now', v_now, 'limits', to_jsonb(v_limits),
        'key_limits', (select to_jsonb(c) from public.rate_limit_configs c where c.subject = 'key' and c.subject_id = p_key_id),
        'used', jsonb_build_object(
            'requests_per_minute', v_usage.minute_ring[15], 'tokens_per_minute', v_usage.minute_ring[16],
            'requests_per_hour', v_usage.hour_ring[27], 'tokens_per_hour', v_usage.hour_ring[28],
            'requests_per_day', v_usage.day_ring[51], 'tokens_per_day', v_usage.day_ring[52], 'running', v_usage.slots),
        'plan', to_jsonb(public.current_plan(v_user, v_now)),
        'assigned', (select to_jsonb(up) from public.user_plans up where up.user_id = p_user_id and up.is_active
                     and up.start_date <= v_now and v_now < up.end_date),
        'plan_used', jsonb_build_object('daily_requests', v_usage.plan_day_requests, 'daily_tokens', v_usage.plan_day_tokens,
                                        'monthly_requests', v_usage.plan_month_requests, 'monthly_tokens', v_usage.plan_month_tokens));
end $$;
revoke all on function public.read_limits(bigint, bigint) from public, anon, authenticated;
grant execute on function public.read_limits(bigint, bigint) to service_role;

-- p: plan {...}. Outcomes: created, slug_taken.
create function public.create_plan(p jsonb) returns jsonb language plpgsql set search_path = '' as $$
declare
    v_plan public.plans := jsonb_populate_record(null::public.plans, p -> 'plan');
begin
    insert into public.plans (slug, name, description, price_per_month_nanos, daily_request_limit, monthly_request_limit, daily_token_limit,
                              monthly_token_limit, concurrency, features, allowed_models, environment_factors)
    values (v_plan.slug, v_plan.name, v_plan.description, v_plan.price_per_month_nanos, v_plan.daily_request_limit,
            v_plan.monthly_request_limit, v_plan.daily_token_limit, v_plan.monthly_token_limit, v_plan.concurrency, v_plan.features,
            v_plan.allowed_models, v_plan.environment_factors)
    on conflict (slug) do nothing returning * into v_plan;
    if not found then
        return jsonb_build_object('outcome', 'slug_taken');
    end if;
    perform public.write_audit(p ->> 'actor', 'create_plan', 'plan:' || v_plan.id, null, null, p ->> 'address', p ->> 'user_agent',
                               (p ->> 'request_id')::uuid, p -> 'plan');
    return jsonb_build_object('outcome', 'created', 'plan', to_jsonb(v_plan));
end $$;
revoke all on function public.create_plan(jsonb) from public, anon, authenticated;
grant execute on function public.create_plan(jsonb) to service_role;

-- p: plan_id, changes {...}; is_active false takes a plan off the list, those who have it keep it. Outcomes: updated, not_found, built_in.
create function public.update_plan(p jsonb) returns jsonb language plpgsql set search_path = '' as $$
declare
    v_plan public.plans;
begin
    select * into v_plan from public.plans where id = (p ->> 'plan_id')::bigint for update;
    if not found then
        return jsonb_build_object('outcome', 'not_found');
    end if;
    v_plan := jsonb_populate_record(v_plan, p -> 'changes');
    if not v_plan.is_active and v_plan.slug in ('free', 'pay-as-you-go') then
        return jsonb_build_object('outcome', 'built_in');
    end if;
    update public.plans set name = v_plan.name, description = v_plan.description, price_per_month_nanos = v_plan.price_per_month_nanos,
        daily_request_limit = v_plan.daily_request_limit, monthly_request_limit = v_plan.monthly_request_limit,
        daily_token_limit = v_plan.daily_token_limit, monthly_token_limit = v_plan.monthly_token_limit, concurrency = v_plan.concurrency,
        features = v_plan.features, allowed_models = v_plan.allowed_models, environment_factors = v_plan.environment_factors,
        is_active = v_plan.is_active, updated_at = clock_timestamp()
    where id = v_plan.id returning * into v_plan;
    perform public.write_audit(p ->> 'actor', 'update_plan', 'plan:' || v_plan.id, null, null, p ->> 'address', p ->> 'user_agent',
                               (p ->> 'request_id')::uuid, p -> 'changes');
    return jsonb_build_object('outcome', 'updated', 'plan', to_jsonb(v_plan));
end $$;
revoke all on function public.update_plan(jsonb) from public, anon, authenticated;
grant execute on function public.update_plan(jsonb) to service_role;

-- p: request_id_refunded, amount_nanos (null: all of it), reason, idempotency_key. A request is refunded at most its cost.
-- Outcomes: refunded, repeated, conflict, not_found, not_settled, too_much.
create function public.refund_request(p jsonb) returns jsonb language plpgsql set search_path = '' as $$
declare
    v_record public.usage_records;
    v_refunded bigint;
    v_amount bigint;
    v_balance bigint;
    v_entry public.credit_transactions;
begin
    select * into v_record from public.usage_records where request_id = (p ->> 'refunded_request_id')::uuid;
    if not found then
        return jsonb_build_object('outcome', 'not_found');
    end if;
    perform from public.users where id = v_record.user_id for no key update;
    select * into v_record from public.usage_records where request_id = v_record.request_id;
    select * into v_entry from public.credit_transactions where idempotency_key = p ->> 'idempotency_key';
    if found then
        return jsonb_build_object('outcome', case when v_entry.request_id = v_record.request_id
                                                       and v_entry.amount_nanos = coalesce((p ->> 'amount_nanos')::bigint, v_entry.amount_nanos)
                                                  then 'repeated' else 'conflict' end,
                                  'transaction_id', v_entry.id, 'user_id', v_entry.user_id, 'amount_nanos', v_entry.amount_nanos,
                                  'balance_nanos', (select credits_nanos from public.users where id = v_entry.user_id));
    elsif v_record.status = 'pending' then
        return jsonb_build_object('outcome', 'not_settled');
    elsif not exists (select from public.gateway_state s where s.mode = v_record.mode) then
        return jsonb_build_object('outcome', 'too_much', 'refundable_nanos', 0); -- play money is never given back as real
    end if;
    select coalesce(sum(amount_nanos), 0) into v_refunded from public.credit_transactions where request_id = v_record.request_id;
    v_amount := coalesce((p ->> 'amount_nanos')::bigint, v_record.cost_nanos - v_refunded);
    if v_amount <= 0 or v_amount > v_record.cost_nanos - v_refunded then
        return jsonb_build_object('outcome', 'too_much', 'refundable_nanos', v_record.cost_nanos - v_refunded);
    end if;
    update public.users set credits_nanos = credits_nanos + v_amount where id = v_record.user_id returning credits_nanos into v_balance;
    insert into public.credit_transactions (user_id, kind, amount_nanos, balance_after_nanos, request_id, actor, reason, idempotency_key)
    values (v_record.user_id, 'refund', v_amount, v_balance, v_record.request_id, p ->> 'actor', coalesce(p ->> 'reason', ''), p ->> 'idempotency_key')
    returning * into v_entry;
    perform public.write_audit(p ->> 'actor', 'refund', 'request:' || v_record.request_id, v_record.user_id, v_record.key_id, p ->> 'address',
                               p ->> 'user_agent', (p ->> 'request_id')::uuid, jsonb_build_object('amount_nanos', v_amount));
    return jsonb_build_object('outcome', 'refunded', 'transaction_id', v_entry.id, 'user_id', v_record.user_id, 'amount_nanos', v_amount,
                              'balance_nanos', v_balance);
end $$;
revoke all on function public.refund_request(jsonb) from public, anon, authenticated;
grant execute on function public.refund_request(jsonb) to service_role;

-- p: user_id or hashes, amount_nanos (signed), reason, idempotency_key. What is held cannot be taken.
-- Outcomes: adjusted, repeated, conflict, not_found, too_much, too_large.
create function public.adjust_credits(p jsonb) returns jsonb language plpgsql set search_path = '' as $$
declare
    v_user public.users := public.lock_target(p);
    v_amount bigint := (p ->> 'amount_nanos')::bigint;
    v_known public.credit_transactions;
    v_entry public.credit_transactions;
begin
    if v_user.id is null then
        return jsonb_build_object('outcome', 'not_found');
    end if;
    select * into v_known from public.credit_transactions where idempotency_key = p ->> 'idempotency_key';
    if found then
        return jsonb_build_object('outcome', case when (v_known.user_id, v_known.kind, v_known.amount_nanos) = (v_user.id, 'adjustment', v_amount)
                                                  then 'repeated' else 'conflict' end,
                                  'transaction_id', v_known.id, 'user_id', v_user.id, 'balance_nanos', v_user.credits_nanos);
    elsif v_user.credits_nanos - v_user.held_nanos + v_amount < 0 then
        return jsonb_build_object('outcome', 'too_much', 'available_nanos', v_user.credits_nanos - v_user.held_nanos);
    elsif v_user.credits_nanos > 9000000000000000000 - v_amount then
        return jsonb_build_object('outcome', 'too_large');
    end if;
    v_entry := public.change_credits(v_user.id, 'adjustment', v_amount, p ->> 'actor', coalesce(p ->> 'reason', ''), p ->> 'idempotency_key', null);
    perform public.write_audit(p ->> 'actor', 'adjust_credits', 'user:' || v_user.id, v_user.id, null, p ->> 'address', p ->> 'user_agent',
                               (p ->> 'request_id')::uuid, jsonb_build_object('amount_nanos', v_amount, 'transaction_id', v_entry.id));
    return jsonb_build_object('outcome', 'adjusted', 'transaction_id', v_entry.id, 'user_id', v_user.id,
                              'balance_nanos', v_entry.balance_after_nanos);
end $$;
revoke all on function public.adjust_credits(jsonb) from public, anon, authenticated;
grant execute on function public.adjust_credits(jsonb) to service_role;
