-- Accounting: registration, credits, limits and plans as an admin sets them, the mode of this database, and the proof that it adds up.

create function public.schema_version() returns bigint language sql immutable set search_path = '' as $$
    select 20261124090500::bigint
$$;
revoke all on function public.schema_version() from public, anon, authenticated;
grant execute on function public.schema_version() to service_role;

create function public.count_users() returns bigint language sql stable set search_path = '' as $$
    select count(*) from public.users where deleted_at is null
$$;
revoke all on function public.count_users() from public, anon, authenticated;
grant execute on function public.count_users() to service_role;

create function public.write_audit(
    p_actor text, p_action text, p_target text, p_user_id bigint, p_key_id bigint, p_address text, p_user_agent text, p_request_id uuid,
    p_details jsonb
) returns void language sql set search_path = '' as $$
    insert into public.audit_logs (actor, action, target, user_id, key_id, ip, user_agent, request_id, details)
    values (p_actor, p_action, p_target, p_user_id, p_key_id, p_address::inet, left(p_user_agent, 512), p_request_id,
            coalesce(p_details, '{}'))
$$;
revoke all on function public.write_audit(text, text, text, bigint, bigint, text, text, uuid, jsonb) from public, anon, authenticated;
grant execute on function public.write_audit(text, text, text, bigint, bigint, text, text, uuid, jsonb) to service_role;

-- Changes the credits of a user whose row is locked, with the ledger entry that explains it. An order that was carried out before
-- returns its first transaction.
create function public.change_credits(
    p_user_id bigint, p_kind text, p_amount_nanos bigint, p_actor text, p_reason text, p_idempotency_key text, p_payment_method text
) returns public.credit_transactions language plpgsql set search_path = '' as $$
declare
    v_entry public.credit_transactions;
    v_balance bigint;
begin
    select * into v_entry from public.credit_transactions where idempotency_key = p_idempotency_key;
    if found then
        return v_entry;
    end if;
    update public.users set credits_nanos = credits_nanos + p_amount_nanos, updated_at = clock_timestamp()
    where id = p_user_id returning credits_nanos into v_balance;
    insert into public.credit_transactions (user_id, kind, amount_nanos, balance_after_nanos, actor, reason, idempotency_key, payment_method)
    values (p_user_id, p_kind, p_amount_nanos, v_balance, p_actor, p_reason, p_idempotency_key, p_payment_method)
    returning * into v_entry;
    return v_entry;
end $$;
revoke all on function public.change_credits(bigint, text, bigint, text, text, text, text) from public, anon, authenticated;
grant execute on function public.change_credits(bigint, text, bigint, text, text, text, text) to service_role;

create function public.activate_subscription(p_user_id bigint, p_funded boolean) returns void
language sql set search_path = '' as $$
    update public.users set subscription_status = 'active', is_funded = is_funded or p_funded, updated_at = clock_timestamp()
    where id = p_user_id
$$;
revoke all on function public.activate_subscription(bigint, boolean) from public, anon, authenticated;
grant execute on function public.activate_subscription(bigint, boolean) to service_role;

-- An address may do this p_limit times an hour. True counts the attempt, false refuses it.
create function public.count_address(p_subject text, p_limit bigint) returns boolean
language plpgsql set search_path = '' as $$
declare
    v_id bigint := hashtextextended(p_subject, 0);
    v_bucket bigint := extract(epoch from clock_timestamp()) * 1000 / 300000;
    v_ring bigint[];
begin
    insert into public.rate_limit_usage (subject, subject_id) values ('address', v_id) on conflict do nothing;
    select public.advance_ring(hour_ring, 13, v_bucket) into v_ring from public.rate_limit_usage
    where subject = 'address' and subject_id = v_id for no key update;
    if v_ring[27] >= p_limit then
        return false;
    end if;
    update public.rate_limit_usage set hour_ring = public.count_in_ring(v_ring, 13, null, 1, 0), last_used_at = clock_timestamp()
    where subject = 'address' and subject_id = v_id;
    return true;
end $$;
revoke all on function public.count_address(text, bigint) from public, anon, authenticated;
grant execute on function public.count_address(text, bigint) to service_role;

-- p: username, email, auth_method, key {...}, signup_nanos, trial_days, address, address_subject (null: not limited), user_agent,
-- request_id, actor, mode (of the instance). Outcomes: registered, address_limit, username_taken, email_taken, wrong_mode.
create function public.register_user(p jsonb) returns jsonb
language plpgsql set search_path = '' as $$
declare
    v_user public.users;
    v_key_id bigint;
    v_nanos bigint := (p ->> 'signup_nanos')::bigint;
    v_constraint text;
begin
    -- A switch to live mode waits for this one, or this one for it: play credits of a new account would outlive the switch.
    perform from public.gateway_state where singleton and mode = coalesce(p ->> 'mode', mode) for share;
    if not found then
        return jsonb_build_object('outcome', 'wrong_mode');
    end if;
    if p ->> 'address_subject' is not null and not public.count_address('register:' || (p ->> 'address_subject'), 5) then
        return jsonb_build_object('outcome', 'address_limit');
    end if;
    begin
        insert into public.users (username, email, auth_method, trial_expires_at)
        values (p ->> 'username', p ->> 'email', p ->> 'auth_method',
                clock_timestamp() + make_interval(days => (p ->> 'trial_days')::int))
        returning * into v_user;
    exception when unique_violation then
        get stacked diagnostics v_constraint = constraint_name;
        return jsonb_build_object('outcome', case v_constraint when 'users_email_key' then 'email_taken' else 'username_taken' end);
    end;
    insert into public.rate_limit_usage (subject, subject_id) values ('user', v_user.id);
    v_key_id := public.insert_key(v_user.id, p -> 'key', true);
    if v_nanos > 0 then
        perform public.change_credits(v_user.id, 'grant', v_nanos, 'gateway', 'signup credits', null, null);
    end if;
    perform public.write_audit(coalesce(p ->> 'actor', 'user:' || v_user.id), 'create', 'user:' || v_user.id, v_user.id, v_key_id,
                               p ->> 'address', p ->> 'user_agent', (p ->> 'request_id')::uuid, null);
    select * into v_user from public.users where id = v_user.id;
    return jsonb_build_object('outcome', 'registered', 'user_id', v_user.id, 'key_id', v_key_id, 'credits_nanos', v_user.credits_nanos,
                              'subscription_status', v_user.subscription_status, 'trial_expires_at', v_user.trial_expires_at);
end $$;

create function public.insert_key(p_user_id bigint, p_key jsonb, p_primary boolean) returns bigint
language plpgsql set search_path = '' as $$
declare
    v_id bigint;
begin
    insert into public.api_keys_new (user_id, key_name, key_prefix, last4, key_hash, hash_secret_id, environment_tag, scope_permissions,
                                     is_primary)
    values (p_user_id, p_key ->> 'key_name', p_key ->> 'key_prefix', p_key ->> 'last4', p_key ->> 'key_hash', p_key ->> 'hash_secret_id',
            p_key ->> 'environment_tag', p_key -> 'scope_permissions', p_primary)
    returning id into v_id;
    insert into public.rate_limit_usage (subject, subject_id, burst_ring, minute_ring, hour_ring, day_ring)
    values ('key', v_id, null, null, null, null);
    return v_id;
end $$;
revoke all on function public.insert_key(bigint, jsonb, boolean) from public, anon, authenticated;
grant execute on function public.insert_key(bigint, jsonb, boolean) to service_role;
revoke all on function public.register_user(jsonb) from public, anon, authenticated;
grant execute on function public.register_user(jsonb) to service_role;

-- The user an admin means: by id, or by one of their keys. Locked, so that what follows is decided on what it reads.
create function public.lock_target(p jsonb) returns public.users
language plpgsql set search_path = '' as $$
declare
    v_id bigint := (p ->> 'user_id')::bigint;
    v_user public.users;
begin
    if v_id is null then
        select k.user_id into v_id from public.api_keys_new k where k.id = public.target_key(p);
    end if;
    select * into v_user from public.users where id = v_id and deleted_at is null for no key update;
    return v_user;
end $$;

create function public.target_key(p jsonb) returns bigint language sql stable set search_path = '' as $$
    select coalesce((select k.id from public.api_keys_new k where k.id = (p ->> 'key_id')::bigint),
                    public.find_key(array(select jsonb_array_elements_text(p -> 'hashes'))))
$$;
revoke all on function public.target_key(jsonb) from public, anon, authenticated;
grant execute on function public.target_key(jsonb) to service_role;
revoke all on function public.lock_target(jsonb) from public, anon, authenticated;
grant execute on function public.lock_target(jsonb) to service_role;

-- p: user_id or hashes, amount_nanos, reason, idempotency_key, actor, address, user_agent, request_id.
-- Outcomes: granted, repeated, not_found, conflict (the idempotency key belongs to another order), too_large.
create function public.grant_credits(p jsonb) returns jsonb
language plpgsql set search_path = '' as $$
declare
    v_user public.users := public.lock_target(p);
    v_amount bigint := (p ->> 'amount_nanos')::bigint;
    v_entry public.credit_transactions;
    v_before bigint := (select coalesce(max(t.id), 0) from public.credit_transactions t);
begin
    if v_user.id is null then
        return jsonb_build_object('outcome', 'not_found');
    elsif v_user.credits_nanos > 9000000000000000000 - v_amount then
        return jsonb_build_object('outcome', 'too_large');
    end if;
    begin
        v_entry := public.change_credits(v_user.id, 'grant', v_amount, p ->> 'actor', coalesce(p ->> 'reason', ''), p ->> 'idempotency_key', null);
    exception when unique_violation then -- the same key, at the same time, for another user
        return jsonb_build_object('outcome', 'conflict');
    end;
    if (v_entry.user_id, v_entry.kind, v_entry.amount_nanos) is distinct from (v_user.id, 'grant'::text, v_amount) then
        return jsonb_build_object('outcome', 'conflict');
    end if;
    if v_entry.id <= v_before then
        return jsonb_build_object('outcome', 'repeated', 'user_id', v_user.id, 'transaction_id', v_entry.id,
                                  'balance_nanos', v_user.credits_nanos);
    end if;
    perform public.activate_subscription(v_user.id, true);
    perform public.write_audit(p ->> 'actor', 'add_credits', 'user:' || v_user.id, v_user.id, null, p ->> 'address', p ->> 'user_agent',
                               (p ->> 'request_id')::uuid, jsonb_build_object('amount_nanos', v_amount, 'transaction_id', v_entry.id));
    return jsonb_build_object('outcome', 'granted', 'user_id', v_user.id, 'transaction_id', v_entry.id,
                              'balance_nanos', v_entry.balance_after_nanos);
end $$;
revoke all on function public.grant_credits(jsonb) from public, anon, authenticated;
grant execute on function public.grant_credits(jsonb) to service_role;

-- p: user_id, or hashes / key_id for one key (subject: user | key), limits {...}, actor, ... Outcomes: set, not_found.
create function public.set_rate_limits(p jsonb) returns jsonb
language plpgsql set search_path = '' as $$
declare
    v_user public.users := public.lock_target(p);
    v_key bigint := case when p ->> 'subject' = 'key' then public.target_key(p) end;
    v_limits public.rate_limit_configs;
begin
    if v_user.id is null or (p ->> 'subject' = 'key' and not exists (
           select from public.api_keys_new k where k.id = v_key and k.user_id = v_user.id)) then
        return jsonb_build_object('outcome', 'not_found');
    end if;
    select * into v_limits from public.rate_limit_configs
    where (subject, subject_id) in ((p ->> 'subject', coalesce(v_key, v_user.id)), ('default', 0))
    order by (subject = 'default') limit 1;
    if v_key is not null and v_limits.subject = 'default' then
        v_limits := null;
    end if;
    v_limits := jsonb_populate_record(v_limits, p -> 'limits');
    v_limits.subject := p ->> 'subject';
    v_limits.subject_id := coalesce(v_key, v_user.id);
    v_limits.updated_at := clock_timestamp();
    delete from public.rate_limit_configs where subject = v_limits.subject and subject_id = v_limits.subject_id;
    insert into public.rate_limit_configs select v_limits.*;
    perform public.write_audit(p ->> 'actor', 'set_limits', v_limits.subject || ':' || v_limits.subject_id, v_user.id, v_key,
                               p ->> 'address', p ->> 'user_agent', (p ->> 'request_id')::uuid, p -> 'limits');
    return jsonb_build_object('outcome', 'set', 'user_id', v_user.id, 'key_id', v_key, 'limits', to_jsonb(v_limits));
end $$;
revoke all on function public.set_rate_limits(jsonb) from public, anon, authenticated;
grant execute on function public.set_rate_limits(jsonb) to service_role;

-- p: user_id, plan_id, duration_months, actor, ... Outcomes: assigned, not_found, plan_not_found.
create function public.assign_plan(p jsonb) returns jsonb
language plpgsql set search_path = '' as $$
declare
    v_user public.users := public.lock_target(p);
    v_plan public.plans;
    v_now timestamptz := clock_timestamp();
    v_end timestamptz := v_now + make_interval(months => (p ->> 'duration_months')::int);
begin
    if v_user.id is null then
        return jsonb_build_object('outcome', 'not_found');
    end if;
    select * into v_plan from public.plans where id = (p ->> 'plan_id')::bigint and is_active;
    if not found then
        return jsonb_build_object('outcome', 'plan_not_found');
    end if;
    update public.user_plans set is_active = false, end_date = greatest(least(end_date, v_now), start_date + interval '1 microsecond')
    where user_id = v_user.id and is_active;
    insert into public.user_plans (user_id, plan_id, start_date, end_date) values (v_user.id, v_plan.id, v_now, v_end);
    perform public.activate_subscription(v_user.id, false);
    perform public.write_audit(p ->> 'actor', 'assign_plan', 'user:' || v_user.id, v_user.id, null, p ->> 'address', p ->> 'user_agent',
                               (p ->> 'request_id')::uuid, jsonb_build_object('plan_id', v_plan.id, 'until', v_end));
    return jsonb_build_object('outcome', 'assigned', 'user_id', v_user.id, 'plan_id', v_plan.id, 'plan_name', v_plan.name, 'end_date', v_end);
end $$;
revoke all on function public.assign_plan(jsonb) from public, anon, authenticated;
grant execute on function public.assign_plan(jsonb) to service_role;

-- Which HMAC secrets the stored keys still need: ids, so that start-up can refuse to drop one.
create function public.key_secrets_in_use() returns jsonb language sql stable set search_path = '' as $$
    select coalesce(jsonb_agg(distinct s), '[]') from (
        select hash_secret_id as s from public.api_keys_new where revoked_at is null
        union select previous_hash_secret_id from public.api_keys_new where previous_valid_until > now()
    ) as used where s is not null
$$;
revoke all on function public.key_secrets_in_use() from public, anon, authenticated;
grant execute on function public.key_secrets_in_use() to service_role;

-- The database takes this mode, or refuses: a live database never serves invented answers again. The first live start ends play money.
create function public.enter_mode(p_mode text) returns jsonb
language plpgsql set search_path = '' as $$
declare
    v_mode text;
begin
    if p_mode is null or p_mode not in ('sandbox', 'live') then
        raise exception 'there is no mode %', p_mode using errcode = 'invalid_parameter_value';
    end if;
    select mode into v_mode from public.gateway_state where singleton for update;
    if v_mode = p_mode then
        return jsonb_build_object('outcome', 'entered', 'mode', v_mode);
    elsif v_mode = 'live' then
        return jsonb_build_object('outcome', 'refused', 'mode', v_mode);
    end if;
    update public.gateway_state set mode = 'live', mode_since = clock_timestamp() where singleton;
    with locked as (
        select id, credits_nanos - held_nanos as unheld from public.users order by id for no key update
    ), emptied as (
        update public.users u set credits_nanos = u.credits_nanos - l.unheld, is_funded = false
        from locked l where l.id = u.id and (l.unheld > 0 or u.is_funded)
        returning u.id, u.credits_nanos as left_nanos, l.unheld
    )
    insert into public.credit_transactions (user_id, kind, amount_nanos, balance_after_nanos, actor, reason)
    select e.id, 'expiry', -e.unheld, e.left_nanos, 'gateway', 'play credits end when the gateway goes live'
    from emptied e where e.unheld > 0 order by e.id;
    return jsonb_build_object('outcome', 'entered', 'mode', 'live');
end $$;
revoke all on function public.enter_mode(text) from public, anon, authenticated;
grant execute on function public.enter_mode(text) to service_role;

-- Promise 2 as a query: every account whose books do not add up. No row, ever.
create function public.audit_ledger() returns table (user_id bigint, credits_nanos bigint, ledger_nanos numeric, held_nanos bigint, pending_nanos numeric)
language sql stable set search_path = '' as $$
    select u.id, u.credits_nanos, coalesce(t.total, 0) - coalesce(r.charged, 0), u.held_nanos, coalesce(r.pending, 0)
    from public.users u
    left join (select t.user_id, sum(t.amount_nanos) as total from public.credit_transactions t group by 1) t on t.user_id = u.id
    left join (select r.user_id, sum(r.cost_nanos) as charged, sum(r.hold_nanos) filter (where r.status = 'pending') as pending
               from public.usage_records r group by 1) r on r.user_id = u.id
    where u.credits_nanos <> coalesce(t.total, 0) - coalesce(r.charged, 0) or u.held_nanos <> coalesce(r.pending, 0)
$$;
revoke all on function public.audit_ledger() from public, anon, authenticated;
grant execute on function public.audit_ledger() to service_role;

notify pgrst, 'reload schema';
